"The studies of chapter vit run by the command of all studies; their stored files are of them."
import json
from pathlib import Path
import pytest
from opentrans.errors import OpenTransError
from opentrans.files import load_json
from opentrans.errors import FormatError, OtherRun
from opentrans.experiments import (SCALES, Arm, arms, get_study, list_studies, load_study, plan_study, result_file,
                                   run_arms, run_study)

RESULTS = Path(__file__).resolve().parents[1]/'docs'/'results'
NAMES = 'esta', 'spt', 'spvit', 'faseg'

def test_the_chapters_studies_are_found():
    "Nobody imports the chapter, and the list has its studies."
    assert {*NAMES, 'spt-parts', 'esta-parts', 'esta-anchors', 'spvit-parts', 'masks'} <= {*list_studies()}

@pytest.mark.parametrize('name', NAMES)
def test_stored_files_are_read(name, tmp_path):
    "The file of five seeds is whole; one without its rows is refused."
    data = load_study(name, RESULTS/f'{name}-5seeds.json')
    assert data['seeds'] == [*range(5)]
    (tmp_path/'less.json').write_text(
        json.dumps({key: value for key,value in data.items() if key not in ('results', 'summary')}))
    with pytest.raises(FormatError): load_study(name, tmp_path/'less.json')

def test_one_seed_has_no_spread():
    "The table of a study of one seed shows its numbers alone; that of several seeds their spread, too."
    from opentrans.experiments.studies import _DETECTED
    text = get_study('esta-parts').text
    data = load_study('esta-parts', RESULTS/'esta-parts-5seeds.json')
    assert '±' in text(data)
    one = text(dict(data, results=[row for row in data['results'] if row['seed'] == 0]))
    assert '±' not in one and 'nan' not in one
    def detectors(*seeds):
        rows = [dict(mask=mask, seed=seed, ap=.105+seed/10, ap50=.5, base=.3, novel=.2)
                for mask in _DETECTED for seed in seeds]
        return get_study('detection').text(dict(more=dict(rows=rows)))
    assert '15.5 ± 7.1' in detectors(0, 1)
    assert '10.5' in detectors(0) and '±' not in detectors(0) and 'nan' not in detectors(0)

def test_the_stored_settings_are_todays():
    "What the study of sensitivity runs with is what its file names."
    from opentrans.vit import spt_study
    data = load_json(RESULTS/'spt-5seeds.json')
    assert data['settings'] == json.loads(json.dumps(spt_study.SET)) and data['vit'] == spt_study.VIT
    assert {run['arm'] for run in data['results']} == {*spt_study.ARMS}

SLOW = 'spt', 'spt-parts', 'esta-parts', 'esta-anchors'

@pytest.mark.parametrize('name', [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), 'spvit-parts',
                                  'faseg'])
def test_a_study_runs_and_goes_on(name, tmp_path, one_thread):
    """At the smallest sizes; the second call reads what is there, and gives the same. Sizes are whole again
    afterwards."""
    from opentrans.vit import spt_study
    before = dict(spt_study.SET)
    made = run_study(name, tmp_path, seeds=1, scale='smoke')
    def times(): return {file: file.stat().st_mtime_ns for file in (tmp_path/'.runs').rglob('*-*.json')}
    kept = times()
    assert (kept and run_study(name, tmp_path, seeds=1, scale='smoke')['results'] == made['results']
            and times() == kept)
    assert (made['run']['command'] == f'opentrans study {name} --seeds 1'
            and {'date', 'processor', 'torch', 'cpu_minutes'} <= {*made['run']})
    assert (load_study(name, result_file(name, tmp_path, 1, 'smoke'))['results'] == made['results']
            and spt_study.SET == before)

def test_what_these_studies_have_not_is_said(tmp_path):
    "No other scale, no plan, no jobs of other settings in their folder."
    with pytest.raises(OpenTransError, match='sizes of its own'): run_study('esta', tmp_path, seeds=1, scale='gpu')
    with pytest.raises(OpenTransError, match='sizes of its own'): plan_study('esta')
    folder = tmp_path/'.runs'/'smoke'/'faseg'
    folder.mkdir(parents=True)
    (folder/'scale.json').write_text('{"size": 1}')
    with pytest.raises(OtherRun, match='other sizes'): run_study('faseg', tmp_path, seeds=1, scale='smoke')
    assert get_study('faseg').run and not (tmp_path/'faseg-smoke-1seeds.json').exists()

def test_single_weights_are_chosen_by_this_chapter(tmp_path, monkeypatch, one_thread):
    "An arm below the layer asks for what no chapter of experiments imports; without it, that is said."
    result, = run_arms(SCALES['smoke'], 0, tmp_path,
                       arms=[Arm('elements', select='sensitivity', level='element', tables=())])
    assert (result['level'], result['frozen']) == ('element', []) and set(arms.TUNERS) == {'sensitivity'}
    monkeypatch.setattr(arms, 'TUNERS', {})
    monkeypatch.setattr(arms, 'find_modules', lambda name: None)
    with pytest.raises(OpenTransError, match='below the layer'): arms.tune_below(None, None, None, None, None)
