"""What is quoted comes from a file: the index's tables are made again from docs/results, and the files say how they
were made."""
import json, math, re, statistics
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
PATH = re.compile('/(home|root|tmp|work|Users)/')
FILES = sorted((root/'docs'/'results').glob('*.json'))

def test_the_index_quotes_the_files(monkeypatch):
    """Each shown cell of the index, run now, says what is stored in it, and so in the README (which check_notebooks
    compares with it)."""
    monkeypatch.chdir(root/'nbs')
    space,shown = {},0
    for cell in json.loads((root/'nbs'/'index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or 'folder' not in source and 'echo: false' not in source: continue
        *body,last = source.rstrip().split('\nMarkdown(')
        exec('\nMarkdown('.join(body) if body else last, space)
        if not body: continue
        now = eval(compile('Markdown('+last, 'index', 'eval'), space).data
        assert now == ''.join(cell['outputs'][0]['data']['text/markdown']), f'out of date: {source[:200]}'
        shown += 1
    assert shown >= 3

README = (root/'README.md').read_text()

def test_the_readme_is_short_and_its_links_lead_somewhere():
    "At most 10 KB, one picture that is there, and no link into nothing."
    assert len(README.encode()) <= 10_000
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)', README)
    assert len(pictures) == 1 and (root/pictures[0]).stat().st_size < 150_000
    linked = [link.split('#')[0] for link in re.findall(r'\]\(([^)]+)\)', README) if not link.startswith('http')]
    assert [link for link in linked if not (root/link).exists()] == []

def test_the_fifteen_lines_are_executed_as_they_are_printed():
    "The block of the README is a cell of the tutorial, to the letter."
    block = re.search(r'```python\n(from opentrans\.all import \*\n.*?)```', README, re.S)[1].strip()
    cells = json.loads((root/'nbs'/'tutorials'/'algorithm1.ipynb').read_text())['cells']
    assert block in [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    assert len([line for line in block.splitlines() if line.strip()]) == 15

@pytest.mark.parametrize('file', FILES, ids=lambda p: p.stem)
def test_a_result_says_how_it_was_made(file):
    data = json.loads(file.read_text())
    assert ('real data' if '-photo-' in file.stem else 'toy scale') in data['what'].lower()
    assert (re.match(r'(\w+=\w+ )*(opentrans|python) ', data['run']['command'])
            and {'date', 'processor', 'cores', 'torch', 'python'} <= set(data['run'])), data['run']
    assert len(data['seeds']) >= 3 and len(set(data['seeds'])) == len(data['seeds'])
    assert not PATH.search(file.read_text()), 'a path of the machine that made it'

@pytest.mark.parametrize('file',
                         sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts),
                         ids=lambda p: p.stem)
def test_no_output_has_a_path_of_a_machine(file):
    for cell in json.loads(file.read_text())['cells']:
        for o in cell.get('outputs', []):
            for kind,text in {**o.get('data', {}), 'text': o.get('text', '')}.items():
                if not kind.startswith('image/'):
                    assert not (m := PATH.search(json.dumps(text))), (m, ''.join(cell['source'])[:200])

@pytest.mark.parametrize('file', [p for p in FILES if 'claims' in json.loads(p.read_text())], ids=lambda p: p.stem)
def test_verdicts_follow_from_the_stored_runs(file):
    "Each claim's difference, interval and verdict, computed again from the runs in the file."
    from opentrans.experiments import difference, results_frame
    data = json.loads(file.read_text())
    if not data['results']: pytest.skip('no arms in this study')
    frame = results_frame(data['results'])
    for c in data['claims']:
        d = difference(frame, c['arm'], c['against'], c['measured'])
        assert (d['verdict'] == c['verdict']
                and all(math.isclose(d[k], c[k], rel_tol=1e-9, abs_tol=1e-9)
                        for k in ('mean', 'low', 'high'))), c['claim']
    from opentrans.experiments import STUDIES, list_studies, summarize
    list_studies()
    # the file is of the study as it is now, and its table is of its runs
    if (s := STUDIES.get(file.stem.rsplit('-', 1)[0])):
        assert ([x.name for x in s.arms] == list(data['summary'])
                and {c.text for c in s.claims} == {c['claim'] for c in data['claims']})
        assert json.loads(json.dumps(summarize(frame, s.arms).to_dict('index'))) == data['summary']
    assert len(data['claims']) == len({(c['claim'], c['measured']) for c in data['claims']})

def shown(cells, name):
    "What the cells under the heading of a study have shown."
    headings = [i
                for i,c in enumerate(cells)
                if c['cell_type'] == 'markdown' and ''.join(c['source']).startswith('### ')]
    at = next((i for i in headings if ''.join(cells[i]['source']).split('\n')[0] == f'### {name}'), None)
    assert at is not None, f'no heading {name}'
    end = next((i for i in headings if i > at), len(cells))
    return [o['data'] for c in cells[at:end] for o in c.get('outputs', []) if 'data' in o]

def test_each_stored_study_has_a_place_on_its_page():
    "A page shows plot and verdicts under a heading of the study's name; the index links to the first of them."
    from opentrans.experiments import list_studies
    pages = [cell for page in ('experiments/56_results', 'experiments/59_league', 'vit/69_studies')
             for cell in json.loads((root/'nbs'/f'{page}.ipynb').read_text())['cells']]
    for name in list_studies():
        if not (root/'docs'/'results'/f'{name}-5seeds.json').exists(): continue
        data = shown(pages, name)
        assert (any(f'{name}-5seeds.json' in ''.join(d.get('text/markdown', '')) for d in data)
                and any('image/png' in d for d in data)), name
    assert '(nbs/experiments/56_results.ipynb)' in (root/'README.md').read_text()

@pytest.mark.slow
def test_a_stored_figure_is_made_again(tmp_path, one_thread):
    """Two arms of the first seed, run anew: they and their difference are nearer to the stored ones than seeds are
    to one another."""
    from opentrans.experiments import SCALES, get_study, run_arms
    stored = json.loads((root/'docs'/'results'/'freezing-5seeds.json').read_text())
    arms = {a.name: a for a in get_study('freezing').arms if a.name in ('dense', 'freeze the whole backbone')}
    made = {r['arm']: 100*r['miou']['base'] for r in run_arms(SCALES['shapes'], 0, tmp_path, arms=[*arms.values()])}
    for name in arms:
        seeds = [100*r['miou']['base'] for r in stored['results'] if r['arm'] == name]
        assert abs(made[name]-seeds[0]) < statistics.stdev(seeds), (name, made[name], seeds)
    claim = next(c
                 for c in stored['claims']
                 if c['measured'] == 'base' and (c['arm'], c['against']) == ('dense', 'freeze the whole backbone'))
    first = [100*next(r['miou']['base'] for r in stored['results'] if r['arm'] == n) for n in arms]
    assert (abs(made['dense']-made['freeze the whole backbone']-(first[0]-first[1])) < 2*claim['sd']
            and made['dense'] > made['freeze the whole backbone'])

def test_what_is_stored_is_of_todays_sizes():
    "The commands in the files make runs of the sizes that the files name."
    from dataclasses import replace
    from opentrans.experiments import SCALES, STUDIES, Scale
    # the demo has become shorter since, as its page says
    demo = replace(SCALES['demo'], imp_iters=30, query_iterations=30)
    sizes = dict(demo=demo,
                 **{n: replace(SCALES['shapes'], **s.scale) for n,s in STUDIES.items() if not s.run})
    there = {n: root/'docs'/'results'/f'{n}-5seeds.json' for n in sizes}
    assert [n
            for n,f in there.items()
            if f.exists() and Scale(**json.loads(f.read_text())['scale']) != sizes[n]] == []
    assert there['demo'].exists() and there['masks'].exists()
