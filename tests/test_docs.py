"The site of the notebooks, and the commands that its pages show."
import importlib.util, json, re, subprocess
from pathlib import Path
import nbformat, pytest
from forked import python

root = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)

def load_site():
    "The script that builds the site, as a module."
    spec = importlib.util.spec_from_file_location('site_of_opentrans', root/'docs'/'site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

site = load_site()

def test_pages_are_built_and_can_be_searched(tmp_path):
    "Three pages: a table of parameters, a formula as MathML, pictures, and words that the search finds."
    only = ('--only', 'index,02_heavy_tail,01e_imp')
    made = python(root/'docs'/'site.py', '--out', tmp_path, *only, cwd=root)
    assert made.returncode == 0, made.stderr[-2000:]
    page = (tmp_path/'02_heavy_tail'/'index.html').read_text()
    assert '<math' in page and not re.search(r'\$\\alpha\$', page)
    assert len(list(tmp_path.glob('02_heavy_tail-*.png'))) >= 3
    table = (tmp_path/'01e_imp'/'index.html').read_text()
    assert '<code>density: float = 0.1</code>' in table
    found = json.loads((tmp_path/'search'/'search_index.json').read_text())['docs']
    assert any('marchenko_pastur' in entry['location'] for entry in found)
    assert not re.findall(
        r'(?:src|href)="https?://(?!opentrans|github\.com|arxiv|squidfunk)[^"]*\.(?:js|css|woff2?)"', page)

def test_a_formula_is_drawn_and_code_is_left_alone():
    assert site.formulas('`$HOME` costs $5') == '`$HOME` costs $5'
    assert site.formulas(r'slope $\alpha$ of `$x$`').count('<math') == 1
    assert 'display="block"' in site.formulas('$$a = b$$')

def test_links_between_notebooks_lead_to_pages(tmp_path):
    assert site.relink('[cost](../04_cost.ipynb#prices)') == '[cost](../04_cost.md#prices)'
    (tmp_path/'a.md').write_text('[here](a.md), [lost](b.md#x), [far](https://example.org/c.md)')
    assert site.check_links(tmp_path) == ['a.md leads to b.md, which is no page']

def test_methods_of_joined_classes_are_told():
    "The methods of a class of many parts have its public name; a typed dictionary beside them is passed over."
    module = importlib.import_module('opentrans.data.vocabulary')
    cells = nbformat.read(root/'nbs'/'data'/'10_vocabulary.ipynb', 4).cells
    sources = [cell.source for cell in cells if cell.source.startswith('#| export')]
    titles = {title for source in sources for title,_ in site.find_symbols(module, source)}
    assert {'Vocabulary', 'Vocabulary.index', 'Vocabulary.subset', 'Vocabulary.from_file'} <= titles

def test_every_notebook_has_its_place_in_the_sidebar():
    config = site.yaml.safe_load((root/'_quarto.yml').read_text())['website']
    listed = set(site.pages(site.navigation(config['sidebar']['contents'], ())))
    assert listed == {path.relative_to(root/'nbs').with_suffix('.md') for path in NOTEBOOKS}

def shell_blocks():
    "Each block of shell commands of the pages: (where, text)."
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != 'markdown': continue
            for number, block in enumerate(re.findall(r'```(?:bash|sh|console)\n(.*?)```', cell.source, re.S)):
                yield pytest.param(block, id=f'{path.stem}-{number}')
    for path in (root/'README.md', root/'CONTRIBUTING.md'):
        for number, block in enumerate(re.findall(r'```(?:bash|sh|console)\n(.*?)```', path.read_text(), re.S)):
            yield pytest.param(block, id=f'{path.stem}-{number}')

@pytest.mark.parametrize('block', list(shell_blocks()))
def test_shell_blocks_are_shell(block):
    "bash takes the commands that pages show; a backslash at the end of a line is one backslash."
    read = subprocess.run(['bash', '-n'], input=block, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert not re.search(r'\\\\$', block, re.M), 'two backslashes at the end of a line'
