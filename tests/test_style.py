"The check of lines finds each of its faults, and the tree has no more of them than it had."
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import check_style

CLEAN = 'def double(number):\n    return 2*number\n'
FAULTS = {
    'E501': f'text = "{"x"*130}"\n',
    'E702': 'first = 1; second = 2\n',
    'E731': 'double = lambda number: 2*number\n',
    'E741': 'l = 1\n',
    'F841': 'def nothing():\n    unused = 1\n',
    'nested-ternary': 'sign = 1 if CLEAN else (0 if FAULTS else -1)\n'.replace('CLEAN', '3').replace('FAULTS', '4'),
}

needs_ruff = pytest.mark.skipif(not Path(check_style.RUFF[0]).exists(), reason='ruff comes with opentrans[dev]')


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "An empty project with the rules of this one."
    for folder in ('nbs', 'tests', 'benchmarks'):
        (tmp_path/folder).mkdir()
    shutil.copy(check_style.ROOT/'ruff.toml', tmp_path)
    monkeypatch.setattr(check_style, 'ROOT', tmp_path)
    monkeypatch.setattr(check_style, 'DEBT', tmp_path/'tests'/'style_debt.json')
    return tmp_path


def notebook(path, *cells):
    "A notebook of code cells."
    cells = [dict(cell_type='code', source=cell, metadata={}, outputs=[], execution_count=None) for cell in cells]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


@needs_ruff
@pytest.mark.parametrize('rule', FAULTS)
def test_each_fault_is_found_in_a_script_and_in_a_notebook(tree, rule):
    (tree/'tests'/'some.py').write_text(FAULTS[rule])
    notebook(tree/'nbs'/'some.ipynb', '#| export\n' + FAULTS[rule])
    assert check_style.counted(check_style.findings()) == {'nbs/some.ipynb': {rule: 1}, 'tests/some.py': {rule: 1}}


@needs_ruff
def test_cells_that_are_shown_are_narrower_and_exported_ones_short(tree):
    wide = f'text = "{"x"*100}"'
    long = '#| export\n' + '\n'.join(f'name_{i} = {i}' for i in range(check_style.CELL_STATEMENTS + 1))
    notebook(tree/'nbs'/'some.ipynb', wide, f'#| hide\n{wide}', f'#| export\n{wide}', long)
    found = {(one.rule, one.place) for one in check_style.findings()}
    assert found == {('wide-cell', 'cell 1:1'), ('long-cell', 'cell 4:')}


@needs_ruff
@pytest.mark.parametrize('quoted, is_found', [('A sentence.\n> And another', False), ('No sentence', True),
                                              (f'{"x"*check_style.LEAD_WIDTH}.', True)])
def test_the_first_quoted_line_of_a_page_stands_alone(tree, quoted, is_found):
    cell = dict(cell_type='markdown', source=f'# Page\n\n> {quoted}\n\nText.', metadata={})
    (tree/'nbs'/'some.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    assert [one.rule for one in check_style.findings()] == ['lead']*is_found


@needs_ruff
def test_magics_are_no_fault(tree):
    notebook(tree/'nbs'/'some.ipynb', '%matplotlib inline\n!ls\nsize = 1')
    assert not check_style.findings()


@needs_ruff
def test_counts_only_fall(tree, capsys):
    script = tree/'tests'/'some.py'
    script.write_text(FAULTS['E702']*2)
    assert check_style.main([]) == 1 and "some.py: E702 2 times, allowed 0" in capsys.readouterr().out
    assert check_style.main(['--write']) == 1, 'what is not allowed does not become so by --write'
    assert check_style.main(['--accept']) == 0
    script.write_text(FAULTS['E702'])
    assert check_style.main(['--write']) == 0
    script.write_text(FAULTS['E702']*2)
    assert check_style.main([]) == 1
    script.write_text(CLEAN)
    assert check_style.main(['--write']) == 0 and json.loads(check_style.DEBT.read_text()) == {}


@needs_ruff
def test_the_tree_is_no_worse_than_it_was(capsys):
    assert check_style.main([]) == 0, capsys.readouterr().out
