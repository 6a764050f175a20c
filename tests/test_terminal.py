"What a terminal shows: no number is cut, shares are percent, errors name flags, findings are grouped."
import io, json, os, re, subprocess, sys, types
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from opentrans.cli import options, terminal
from opentrans.cli.options import app
from typer.testing import CliRunner

class Screen(io.StringIO):
    "A terminal."
    def isatty(self): return True

def shown(monkeypatch, width, result, **how):
    "What a terminal of some columns shows, without its colours."
    screen = Screen()
    monkeypatch.setenv('COLUMNS', str(width))
    monkeypatch.setattr('sys.stdout', screen)
    terminal.show(result, **how)
    return re.sub(r'\x1b\[[\d;]*m', '', screen.getvalue())

@pytest.mark.parametrize('width', [30, 50, 80, 200])
def test_no_number_is_cut(monkeypatch, width):
    "Each number is there as a whole, or its column is named as left out."
    columns = {f'measure_{i}': [12345.678 + i, 0.000123456] for i in range(9)}
    frame = pd.DataFrame(columns, index=['dense', 'distilled mask'])
    said = shown(monkeypatch, width, frame, title='a table')
    table, _, rest = said.partition('left out for want of room')
    missing = [name for name in columns if name in rest]
    assert (missing == []) == (width == 200) and [*columns][len(columns)-len(missing):] == missing
    assert len(re.findall(r'1\.23[45]e\+04|1235\d', table)) == len(columns)-len(missing)
    assert '…' not in said and all(len(line) <= width for line in table.splitlines())

def test_shares_are_percent_for_people_and_fractions_in_json(monkeypatch):
    result = dict(miou=.12345, pq=.5, best_miou=1., loss=.25, n_images=3)
    said = shown(monkeypatch, 80, result)
    assert re.search(r'miou\s+12\.3 %', said) and re.search(r'pq\s+50\.0 %', said)
    assert re.search(r'loss\s+0\.25\b', said) and re.search(r'best_miou\s+100\.0 %', said)
    assert json.loads(shown(monkeypatch, 80, result, as_json=True)) == result

def test_a_message_names_flags(monkeypatch):
    "Only what the running command has as a flag, and nothing within --set."
    names = ('root', 'batch_size', 'ignore')
    params = [types.SimpleNamespace(name=name, opts=[f"--{name.replace('_', '-')}"]) for name in names]
    context = types.SimpleNamespace(command=types.SimpleNamespace(params=params))
    monkeypatch.setitem(terminal._NOW, 'context', context)
    assert terminal._as_flags('Give root=..., or x=3.') == 'Give --root ..., or x=3.'
    assert terminal._as_flags('other values (ignore=...)') == 'other values (--ignore ...)'
    assert terminal._as_flags('e.g. --set batch_size=8') == 'e.g. --set batch_size=8'
    assert terminal._as_flags("{'root='}") == "{'root='}"

def test_findings_are_grouped_with_the_flag_that_helps(tmp_path):
    "Seven files with one strange value are one line."
    for part in ('images', 'labels'): (tmp_path/part).mkdir()
    for i in range(7):
        Image.fromarray(np.full((8, 8, 3), 9*i, np.uint8)).save(tmp_path/'images'/f'{i}.png')
        Image.fromarray(np.array([[0, 1, 11, 255]*2]*8, np.uint8)).save(tmp_path/'labels'/f'{i}.png')
    base = ['data', 'check', 'folder', '--root', str(tmp_path), '--classes', 'a,b']
    told = CliRunner().invoke(app, base)
    lines = [line for line in told.output.splitlines() if line.startswith('  ') and 'holds 11' in line]
    assert len(lines) == 1 and '(7 in all)' in lines[0] and 'add --ignore 11,255' in told.output
    assert '--ignore ...' in lines[0] and 'ignore=' not in told.output
    assert CliRunner().invoke(app, [*base, '--ignore', '11,255', '--json']).exit_code == 0

def test_help_is_grouped_and_every_command_has_its_group():
    told = CliRunner().invoke(app, ['--help']).output
    for panel in options._PANELS: assert panel in told
    assert 'Examples' in told and '─ Commands ' not in told

def test_a_shell_completes_commands():
    words = dict(_OPENTRANS_COMPLETE='complete_bash', COMP_WORDS='opentrans se', COMP_CWORD='1')
    code = 'import sys; sys.argv[0] = "opentrans"; from opentrans.cli import main; main()'
    run = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, **words), capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ['segment'], run
