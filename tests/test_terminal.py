"What a terminal shows: no number is cut, shares are percent, errors name flags, findings are grouped."
import io, json, os, re, subprocess, sys, types
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from opentrans.cli import options, terminal
from opentrans.cli.options import app
from typer.main import get_command
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
    assert terminal._as_flags("root='here' or root=None") == '--root here or --root none'

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

def _commands(group, words=()):
    "Every command under a group, as the words that call it."
    for name,command in group.commands.items():
        if hasattr(command, 'commands'): yield from _commands(command, (*words, name))
        else: yield (*words, name)

@pytest.mark.parametrize('words', list(_commands(get_command(app))), ids=' '.join)
def test_no_flag_is_cut_in_help(words):
    "In a terminal of 80 columns every flag stands there as a whole, and no line is longer."
    told = CliRunner(env=dict(COLUMNS='80', TERMINAL_WIDTH='80')).invoke(app, [*words, '--help'])
    assert told.exit_code == 0 and '…' not in told.output
    assert max(map(len, told.output.splitlines())) <= 80

def test_words_stand_left_and_numbers_right(monkeypatch):
    "Rows without names have no numbers of their own, and a long heading is broken where its cells are short."
    frame = pd.DataFrame({'framework': ['fpn', 'mask2former'], 'sparse engine': ['yes', 'no (1)'],
                          'weights': [1_234_567, 7]})
    lines = [line.rstrip() for line in shown(monkeypatch, 80, frame).splitlines() if line.strip()]
    assert [line.strip() for line in lines[:2]] == ['sparse', 'framework     engine     weights']
    assert lines[3:] == ['  fpn           yes      1,234,567', '  mask2former   no (1)           7']

def test_reasons_are_notes_below_the_table_of_models():
    told = CliRunner().invoke(app, ['models'])
    assert told.exit_code == 0 and re.search(r'^\(1\) SED reads maps .*\.$', told.output, re.M)
    assert 'no: ' not in told.output and '\x1b' not in told.output and r'\x1b' not in told.output
    rows = json.loads(CliRunner().invoke(app, ['models', '--json']).output)
    assert any(row['mask'].startswith('no: SED') for row in rows.values())

def test_a_method_that_needs_training_is_named(tmp_path):
    Image.new('RGB', (40, 40)).save(tmp_path/'photo.png')
    for method in ('naclop', 'paper'):
        told = CliRunner().invoke(app, ['segment', str(tmp_path/'photo.png'), 'sky', '--method', method])
        assert f"Unknown method '{method}'; choose one of: maskclip" in str(told.exception)

def test_a_shell_completes_commands():
    words = dict(_OPENTRANS_COMPLETE='complete_bash', COMP_WORDS='opentrans se', COMP_CWORD='1')
    code = 'import sys\nsys.argv[0] = "opentrans"\nfrom opentrans.cli import main\nmain()'
    run = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, **words), capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ['segment'], run

def test_a_run_ends_with_its_miou_and_the_next_command(tmp_path):
    "A split that is not there costs the mIoU alone, and is told before anything is trained."
    base = ['finetune', '--iterations', '2', '--batch-size', '2', '--eval-limit', '2', '--out']
    told = CliRunner().invoke(app, [*base, str(tmp_path/'run')])
    assert told.exit_code == 0 and re.search(r'miou\s+\d+\.\d %', told.stdout), told.output
    assert f"next: opentrans evaluate --model {tmp_path/'run'} --data shapesworld --split val" in told.stdout
    lost = CliRunner().invoke(app, [*base, str(tmp_path/'other'), '--eval-split', 'tomorrow', '--json'])
    assert lost.exit_code == 0 and 'there will be no mIoU at the end' in lost.stderr
    assert 'miou' not in json.loads(lost.stdout)

ENDING = """
import atexit, sys, weakref
sys.argv = ['opentrans', *sys.argv[1:]]
class Seen:
    def __del__(self): print('taken apart')
seen = Seen()
from opentrans.cli import run_command
atexit.register(print, 'registered before')
print('waits in the buffer')
finalizer = weakref.finalize(seen.__class__, print, 'finalized')
run_command()
"""

def ended_process(code, *words, folder):
    "A process of its own, not a forked one: how it ends is what is asked."
    return subprocess.run([sys.executable, '-c', code, *words], cwd=folder, capture_output=True, text=True)

@pytest.mark.parametrize('words,code', [(['--version'], 0), (['nosuch'], 2), (['segment', 'missing.jpg', 'cow'], 2)])
def test_a_command_ends_with_its_code_after_all_that_waits_for_it(words, code, tmp_path):
    ended = ended_process(ENDING, *words, folder=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.startswith('waits in the buffer')
    assert 'finalized' in ended.stdout and 'registered before' in ended.stdout
    assert 'taken apart' not in ended.stdout
    assert ended.stderr.startswith(('Usage', 'error: The image')) == (code == 2)

def test_an_error_nobody_expects_keeps_its_traceback(tmp_path):
    failing = 'import opentrans.cli.entry as entry\nentry._run = lambda: 1/0\nrun_command()\n'
    code = ENDING.replace('run_command()\n', failing)
    ended = ended_process(code, '--version', folder=tmp_path)
    assert ended.returncode == 1 and 'ZeroDivisionError' in ended.stderr and 'taken apart' in ended.stdout
