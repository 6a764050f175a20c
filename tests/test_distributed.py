"""Two processes on the CPU, as `accelerate launch` starts them, once by it: what they compute is what one process
computes, and the loss of one ends the run so that it can be continued."""
import functools, json, os, signal, subprocess, sys
from pathlib import Path
import pytest
import torch
from opentrans import training
from opentrans.files import load_tensors
from conftest import PATIENCE, until
from forked import Forked, python, two_processes
from test_cli import opentrans

pytest.importorskip('accelerate')
root = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes',
          '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port',
          '0']
ENV = dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0',
           PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]))

def in_two_and_one(folder, script):
    "The folder, what each of two processes says that run a script beside this file, and what one says that runs it."
    (folder/'one').mkdir()
    words = ['-W', 'ignore', Path(__file__).with_name(script)]
    alone = python(*words, folder/'one', env=ENV, cwd=folder)
    for process in (alone, *two_processes(*words, folder, env=ENV, cwd=folder)):
        assert process.returncode == 0, process.stderr[-3000:]
    told = [json.loads((folder/f'rank{rank}.json').read_text()) for rank in (0, 1)]
    return folder, told, json.loads((folder/'one'/'rank0.json').read_text())

@pytest.fixture(scope='module')
def both(tmp_path_factory): return in_two_and_one(tmp_path_factory.mktemp('two'), 'two_train.py')

def test_two_processes_are_one(both):
    """Losses, and the weights they lead to, are those of one process with the same batches; every process has the
    same ones."""
    d,(a,b),one = both
    assert (a['n'], b['rank'], one['n']) == (2, 1, 1)
    assert a['loss'] == b['loss'] and a['weights'] == b['weights'], 'the processes have drifted apart'
    assert a['loss'] == pytest.approx(one['loss'], rel=1e-4) and len(set(a['loss'])) == 4
    assert a['parts'] == pytest.approx(one['parts'], rel=1e-4), 'gradient accumulation differs'
    x,y = (load_tensors(p/'run'/'last.safetensors')[0] for p in (d, d/'one'))
    # AdamW divides small differences by small gradients
    for k in x: assert torch.allclose(x[k].float(), y[k].float(), atol=2e-3), k
    assert (d/'run'/'history.csv').read_text().count('\n') == 5, 'one process writes the log'

def test_same_mask_everywhere(both):
    _,(a,b),one = both
    assert all(a['zeros']) and all(b['zeros'])
    assert a['imp'] == b['imp'], 'Algorithm 1 found different masks'
    assert a['imp'][1] == one['imp'][1] == pytest.approx(.3, abs=1e-3)
    for r in (a, b): assert 'different pruned weights' in r['mask'], 'processes with different masks were let go on'

def test_metrics_of_an_uneven_share(both):
    "5 images on 2 processes, and 1 image on 2: the figures are those of one process, to the last bit."
    _,(a,b),one = both
    for k in ('miou', 'accuracy', 'images', 'single', 'alone', 'pq'): assert a[k] == b[k] == one[k], k
    assert a['images'] == 5 and a['miou'] == a['alone'] and 0 < a['pq'] < 1

def test_errors_are_told_by_all(both):
    """A picture that is not a number in the part of one process ends all, with one message; so does a batch that
    cannot be divided."""
    d,(a,b),one = both
    assert (a['nan'].split(';')[0] == b['nan'].split(';')[0] and 'not finite' in a['nan']
            and 'not finite' in one['nan'])
    if (d/'nan'/'last.safetensors').exists():
        assert all(t.isfinite().all()
                   for t in load_tensors(d/'nan'/'last.safetensors')[0].values()
                   if t.is_floating_point() and t.numel() > 1 and t.dim() != 2)
    for told in (a, b, one):
        assert 'Another run is at work' in told['taken'], 'a locked folder was entered'
        assert 'NaN on some of the images' in told['score'], 'a picture that one process sees alone got a score'
    assert ('must be a multiple of 2' in a['odd'] and 'must be a multiple of 2' in b['odd']
            and 'has a device of its own' in a['device'])

def ranks(folder):
    "Process ids of the command that works in a folder, by rank."
    res = {}
    for p in Path('/proc').iterdir():
        if not p.name.isdigit(): continue
        try:
            args = (p/'cmdline').read_bytes().split(b'\0')
            env = dict(e.split(b'=', 1) for e in (p/'environ').read_bytes().split(b'\0') if b'=' in e)
        except OSError: continue
        if str(folder).encode() in args and b'RANK' in env: res[int(env[b'RANK'])] = int(p.name)
    return res

@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='processes are found in /proc')
def test_a_killed_process_ends_the_run(tmp_path, monkeypatch):
    """kill -9 of one of two: the command ends with a message and exit code 1, and the same command goes on from its
    checkpoint."""
    args = ['finetune', '--out', tmp_path/'out', '--batch-size', 2, '--iterations', 400, '--checkpoint-every', 2,
            '--print-every', 1, '--device', 'cpu']
    args = [str(a) for a in args]
    with open(tmp_path/'log', 'w') as log:
        p = subprocess.Popen([*LAUNCH, '-m', 'opentrans.cli', *args], stderr=log, stdout=log, env=ENV, cwd=tmp_path)
    last = tmp_path/'out'/'run'/'last.safetensors'
    until(lambda: last.exists() or p.poll() is not None, 'no checkpoint was written')
    assert last.exists(), (tmp_path/'log').read_text()[-3000:]
    os.kill(ranks(tmp_path/'out')[1], signal.SIGKILL)
    code,said = p.wait(PATIENCE),(tmp_path/'log').read_text()
    assert code == 1, said[-2000:]
    assert ('error: process 0 of 2 lost another one at iteration' in said
            and 'the same call goes on from there' in said), said[-3000:]
    _,meta = load_tensors(last)
    at = json.loads(meta['iteration'])
    assert 2 <= at < 400 and at % 2 == 0
    # the rest is done by one process, which reads what two have written; a change of the recipe is refused
    r = opentrans(*args, '--lr', .5)
    assert r.returncode == 2 and 'had other settings' in r.stderr and load_tensors(last)[1] == meta
    told = []
    def stop(f, row):
        told.append(row['iteration'])
        raise KeyboardInterrupt
    whole = training.finetune
    monkeypatch.setattr(training, 'finetune', lambda *a, **kw: whole(*a, **kw, callback=stop))
    r = opentrans(*args)
    assert told == [at] and r.returncode == 130, (told, r)

@pytest.mark.parametrize('sent', (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)))
def test_a_notice_to_end_is_taken(tmp_path, sent):
    """SIGTERM, as a scheduler sends it, or Ctrl-C: the iteration is finished, a checkpoint written, exit code 143
    or 130."""
    args = ['finetune', '--out', tmp_path/'out', '--batch-size', 1, '--iterations', 500, '--print-every', 1,
            '--checkpoint-every', 1000]
    run = Forked(['-m', 'opentrans.cli', *args], ENV, tmp_path, tmp_path)
    until(lambda: 'iteration 3/' in run.said() or run.poll() is not None, 'no third iteration', run.said)
    run.send_signal(sent)
    assert run.wait() == 128+sent, run.said()[-2000:]
    lines = run.said().splitlines()
    at = json.loads(load_tensors(tmp_path/'out'/'run'/'last.safetensors')[1]['iteration'])
    if sent == signal.SIGINT: assert at >= 3 and lines[-1] == 'interrupted', lines[-2:]
    else:
        assert (at >= 3 and f'stopped after iteration {at-1}' in lines[-1]
                and f'of iteration {at}' in lines[-1]), lines[-2:]

# --- distillation in Algorithm 1

@pytest.fixture(scope='module')
def pruned(tmp_path_factory):
    "Masks that two processes find, and those that one finds."
    return in_two_and_one(tmp_path_factory.mktemp('prune'), 'two_prune.py')

@pytest.mark.parametrize('case', ['frozen', 'norms', 'image', 'windows', 'own'])
def test_two_processes_find_the_mask_of_one(pruned, case):
    """The pairs of regions are those of the whole batch, regions and windows the same ones, norms those of all: one
    mask, whoever finds it."""
    d,(a,b),one = pruned
    x,y,z = (torch.load(file, weights_only=True)
             for file in (d/f'{case}.0.pt', d/f'{case}.1.pt', d/'one'/f'{case}.0.pt'))
    assert all(torch.equal(x[part][k], y[part][k]) for part in ('mask', 'net')
               for k in x[part]), 'the processes have drifted apart'
    assert a[case] == b[case] and a[case]['loss'] == pytest.approx(one[case]['loss'], rel=1e-4)
    assert a[case]['cached'] == one[case]['cached'], 'each keeps what the teacher has told any of them'
    both,either = (sum(int(op(x['mask'][k], z['mask'][k]).sum()) for k in x['mask'])
                   for op in (torch.logical_and, torch.logical_or))
    assert both/either > .999, f'IoU {both/either}'
    apart = torch.cat([(x['net'][k]-z['net'][k]).float().abs().flatten() for k in x['net']])
    # AdamW divides small differences by small gradients
    assert (apart > 2e-3).float().mean() < 1e-3
    if case == 'image': assert apart.max() < 1e-4                        # SGD does not

def test_distillation_beside_a_framework_in_two_processes(pruned):
    "The loss of a framework is the mean over the processes, whose gradients keep them together."
    _,(a,b),one = pruned
    assert (a['own loss'] == b['own loss']
            and a['own loss']['loss'] == pytest.approx(one['own loss']['loss'], rel=.3))

def test_errors_of_a_distillation_are_told_by_all(pruned):
    _,told,one = pruned
    for r in told:
        assert ('must be a multiple of 2' in r['odd'] and 'different settings of the training' in r['other']
                and 'The loss is nan' in r['nan'])
    assert 'other' not in one and 'odd' not in one and one['nan'] == told[0]['nan']

@pytest.fixture(scope='module')
def courses(tmp_path_factory):
    """Losses of a run in one process, in two, begun in one and ended in two, and the other way round: by kind of
    training."""
    d, script = tmp_path_factory.mktemp('elsewhere'), Path(__file__).with_name('resume_elsewhere.py')
    plans = dict(one=[(1, 0)], two=[(2, 0)], up=[(1, 3), (2, 0)], down=[(2, 3), (1, 0)])
    @functools.cache
    def run(name):
        (d/name).mkdir()
        for count, halt in plans[name]:
            words = ['-W', 'ignore', script, d/name, halt]
            told = dict(env=ENV, cwd=d)
            done = two_processes(*words, **told) if count == 2 else [python(*words, **told)]
            for process in done: assert process.returncode == 0, process.stderr[-3000:]
        return d/name
    return lambda name, kind: json.loads((run(name)/f'{kind}.json').read_text())

@pytest.mark.parametrize('kind,near', [('norms', 1e-3), ('parts', 1e-4), ('half', 3e-2)])
@pytest.mark.parametrize('name', ['down', *(pytest.param(name, marks=pytest.mark.slow) for name in ('two', 'up'))])
def test_a_run_goes_on_in_another_number_of_processes(courses, name, kind, near):
    """Norms that learn see the whole batch, wherever its images are; gradients of parts add up; half precision is
    as near as it is."""
    losses = courses(name, kind)
    assert len(losses) == 6 and losses == pytest.approx(courses('one', kind), rel=near)
    assert losses[-1] < losses[0]
