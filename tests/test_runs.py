"""Runs that are killed, damaged, forged, doubled or out of room: the same result, or one sentence and nothing
changed."""
import contextlib, functools, json, os, pickle, shutil, signal, subprocess, sys, textwrap, warnings
from pathlib import Path
import pytest
import torch
from safetensors.torch import save_file
from mutations import COUNT, check_reader, digest
from opentrans.errors import OpenTransError
from opentrans.files import load_metadata, load_tensors, save_tensors
from opentrans.runtime import seeded
from opentrans.files import lock_folder, pack_bits, read_checkpoint
from opentrans.pruning import imp, load_baked, SparseMask, transfer_checkpoint
from opentrans.pruning.mask import _digest
from forked import Forked, python as forked_python
from test_cli import fails
from test_pruning import small, tiny_resnet, zeros

pytestmark = pytest.mark.usefixtures('one_thread')

tests = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(tests.parent), str(tests)])
ENV = dict(os.environ, OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0', PYTHONPATH=PATH)
KW = dict(density=.5, p=.2)

def forked(*args, cwd):
    "A process that begins with everything imported, and what it said."
    return forked_python('-W', 'ignore', *args, env=ENV, cwd=cwd)

def refused(told, model=None, train=None, **kw):
    "The one sentence in which a run is refused, or ends."
    with pytest.raises(OpenTransError, match=told) as caught: imp(model or small(), train or noise, **{**KW, **kw})
    return str(caught.value)

def noise(model, round, iters=1):
    "A round of training on noise."
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(iters):
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return dict(loss=loss, accuracy=float('nan'), margin=float('inf'))

class Remembers:
    "A training that keeps something between rounds."
    def __init__(self): self.sum = torch.zeros(2)
    def __call__(self, model, round):
        self.sum += torch.randn(2)
        return noise(model, round)
    def state_dict(self): return dict(sum=self.sum)
    def load_state_dict(self, state):
        if list(state) != ['sum'] or state['sum'].shape != (2,): raise KeyError('sum')
        if state['sum'].dtype != torch.float32: raise TypeError('sum')
        self.sum = state['sum'].clone()

def rounds(folder):
    "Number of whole rounds in the folder of a run; -1 if it has not begun."
    file = Path(folder)/'imp.safetensors'
    return len(json.loads(load_metadata(file)['history'])) if file.exists() else -1

def stopped(folder, at=1, train=noise, model=None, **kw):
    "A run that is left in its second round."
    def stops(model, round):
        if round == at: raise KeyboardInterrupt
        return train(model, round)
    if hasattr(train, 'state_dict'):
        stops.state_dict, stops.load_state_dict = train.state_dict, train.load_state_dict
    model = model or small()
    with pytest.raises(KeyboardInterrupt): imp(model, stops, checkpoint_dir=folder, **{**KW, **kw})
    return model

def rewritten(file, change, out=None):
    "A copy of a tensor file with other contents and the checksum that fits them."
    tensors, meta = load_tensors(file)
    change(tensors, meta)
    save_tensors(tensors, out or file, meta)

# --- a break changes nothing --------------------------------------------------------------------------------

ALSO = [pytest.param(*case, marks=pytest.mark.slow) for case in (('crop', 1), ('crop', 2), ('attention', 1))]

@pytest.mark.parametrize('mode,n', [('attention', 2), *ALSO])
def test_a_killed_run_ends_as_one_without_a_break(tmp_path, mode, n):
    """Sixteen iterations a round, kill -9 at the start, behind a checkpoint within the first round and behind one
    within the second, in one process or two: mask, weights, history and log are equal to the last bit. Without
    what the trainer remembers they are not."""
    r = forked(tests/'killed_distill.py', tmp_path, mode, n, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    assert 'without its memory: False' in r.stdout, 'this world would not show the failure'

@pytest.mark.slow
@pytest.mark.parametrize('launch', [[], ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']])
def test_the_command_killed_and_given_again_is_the_command(tmp_path, launch):
    "The whole command, in one process and by torchrun in two."
    def command(name):
        args = '--density .81 --drop .1 --iters 40 --batch-size 4 --lr 3e-3 --device cpu'.split()
        files = ['--out', f'{name}.safetensors', '--weights', f'{name}-weights.safetensors']
        return [sys.executable, '-W', 'ignore', *launch, '-m', 'opentrans.cli', 'prune', *args, *files]
    options = dict(env=dict(ENV, ACCELERATE_USE_CPU='true'), cwd=tmp_path)
    subprocess.run(command('whole'), check=True, capture_output=True, **options)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command('cut'), start_new_session=True, **quiet, **options)
    wait_for(lambda: rounds(tmp_path/'cut.safetensors.run') >= 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command('cut'), check=True, capture_output=True, **options)
    assert (tmp_path/'cut.safetensors').read_bytes() == (tmp_path/'whole.safetensors').read_bytes()
    assert (tmp_path/'cut-weights.safetensors').read_bytes() == (tmp_path/'whole-weights.safetensors').read_bytes()

def listed(folder): return sorted(p.name for p in folder.iterdir())

def wait_for(seen, process):
    "Wait until something is to be seen, or the process has ended."
    while not seen() and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired): process.wait(.05)
    assert seen(), f'the process ended with {process.poll()} before'

def test_what_a_training_remembers_is_part_of_the_run(tmp_path):
    "Also where it is inside a `partial`, a decorated function or a method."
    whole = Remembers()
    mask, history = imp(small(), whole, checkpoint_dir=tmp_path/'whole', **KW)
    def decorated(keeper):
        @functools.wraps(keeper)
        def inner(model, round): return keeper(model, round)
        inner.__wrapped__ = keeper
        return inner
    def itself(keeper): return keeper
    def method(keeper): return keeper.__call__
    for i, wrap in enumerate((itself, functools.partial, decorated, method)):
        stopped(tmp_path/f'{i}', train=Remembers())
        again = Remembers()
        found, rows = imp(small(), wrap(again), checkpoint_dir=tmp_path/f'{i}', **KW)
        assert found == mask and torch.equal(again.sum, whole.sum), i
        assert rows.drop(columns='seconds').equals(history.drop(columns='seconds')), 'with NaN and infinity'

def test_a_model_left_in_the_midst_can_be_given_to_the_same_call(tmp_path):
    "In a notebook the cell is run again after Ctrl-C, with the same, half-trained model."
    whole, history = imp(small(), noise, **KW)
    for at in (0, 1):
        def breaks(model, round):
            noise(model, round)
            if round == at: raise KeyboardInterrupt
        model = small()
        with pytest.raises(KeyboardInterrupt): imp(model, breaks, checkpoint_dir=tmp_path/f'{at}', **KW)
        again, _ = imp(model, noise, checkpoint_dir=tmp_path/f'{at}', **KW)
        assert again == whole, at
        assert again.info == whole.info, 'it began with the weights of the start'

def test_seeds_of_any_size(tmp_path):
    kw = dict(KW, seed=2**64 + 3)
    whole, _ = imp(small(), noise, **kw)
    stopped(tmp_path/'run', **kw)
    again, _ = imp(small(), noise, checkpoint_dir=tmp_path/'run', **kw)
    assert again == whole
    again.save(tmp_path/'m.safetensors')
    assert SparseMask.load(tmp_path/'m.safetensors').info['seed'] == str(2**64 + 3)

def test_constants_of_infinity_are_no_divergence(tmp_path):
    "An attention mask among the buffers holds -inf from the start."
    def net():
        model = small()
        model.register_buffer('future', torch.tensor([0., -float('inf')]))
        return model
    whole, _ = imp(net(), noise, **KW)
    stopped(tmp_path, model=net(), rewind='start')
    again = net()
    assert imp(again, noise, checkpoint_dir=tmp_path, rewind='start', **KW)[0].density == whole.density
    assert again.future[1] == -float('inf')

# --- an end from outside ------------------------------------------------------------------------------------

@pytest.mark.parametrize('sent,code',
                         [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)])
def test_a_notice_to_end_leaves_the_last_round_and_says_how_to_go_on(tmp_path, sent, code):
    "SIGTERM as a scheduler sends it, or Ctrl-C, while the second round is trained."
    args = 'prune --density .1 --iters 2 --batch-size 2 --device cpu --out m.safetensors'.split()
    (tmp_path/'said').mkdir()
    words = ['-W', 'ignore', '-m', 'opentrans.cli', *args]
    process = Forked(words, env=ENV, cwd=tmp_path, folder=tmp_path/'said')
    folder = tmp_path/'m.safetensors.run'
    wait_for(lambda: rounds(folder) >= 1, process)
    process.send_signal(sent)
    ended = process.wait()
    said = process.said()
    assert ended == code, said[-2000:]
    assert "of 22 rounds are done and lie in 'm.safetensors.run': the same call goes on" in said, said[-2000:]
    assert 'Traceback' not in said, said[-2000:]
    assert rounds(folder) >= 1 and not (tmp_path/'m.safetensors').exists()
    whole = [name for name in listed(folder) if not name.startswith('teacher-')]
    assert whole == ['.lock', 'imp.safetensors', 'settings.json'], 'nothing half-written is left'

def test_a_handler_of_the_program_stays(tmp_path):
    "A program that listens for SIGTERM itself hears it."
    heard, before = [], signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    def asks(model, round): os.kill(os.getpid(), signal.SIGTERM)
    try: imp(small(), asks, checkpoint_dir=tmp_path, density=.5, p=.5)
    finally: signal.signal(signal.SIGTERM, before)
    assert heard == [1]

ENDS = dict(lost='lost another one', nan='ended with loss=nan', locked='Another run is at work')

@pytest.mark.parametrize('what,told', ENDS.items())
def test_two_processes_end_together(tmp_path, what, told):
    "One is killed, diverges or finds the folder taken: the other does not wait for ever, and the last round stays."
    r = forked(tests/'two_end.py', tmp_path, what, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    lines = r.stdout.splitlines()
    said = [line for line in lines if line[:2] in ('0:', '1:')]
    assert len(said) == (1 if what == 'lost' else 2), r.stdout + r.stderr[-2000:]
    assert all(told in line for line in said), r.stdout
    assert lines[-1] == {'lost': '[1, -9] 1', 'nan': '[2, 2] 1', 'locked': '[2, 2]'}[what]
    if what == 'lost': assert "1 of 4 rounds are done" in said[0] and 'the same call goes on' in said[0]

# --- what is not a number -----------------------------------------------------------------------------------

def spoil(what, value):
    def work(model, round):
        out = noise(model, round)
        if round < 1: return out
        with torch.no_grad():
            if what == 'norm': model[0][1].bias[0] = value
            if what == 'statistics': model[1][1].running_var[0] = value
            if what == 'first layer': model[0][0].weight[0] = value
        return dict(out, **{what: value}) if 'loss' in what else out
    return work

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('what', ['norm', 'statistics', 'first layer', 'loss', 'loss_last'])
def test_a_round_that_is_not_finite_does_not_replace_the_last_good_one(tmp_path, what, value):
    "Outside of the masked weights, too; and whether or not there is a folder."
    for rewind in (None, 'start'):
        folder = tmp_path/str(rewind)
        for place in (None, folder):
            refused('not finite|ended with loss', train=spoil(what, value), checkpoint_dir=place, rewind=rewind)
        assert rounds(folder) == 1
        again, _ = imp(small(), noise, checkpoint_dir=folder, rewind=rewind, **KW)
        assert again == imp(small(), noise, rewind=rewind, **KW)[0]

def test_a_model_that_is_not_finite_is_refused_before_the_first_round(tmp_path):
    for name in ('0.1.bias', '0.1.running_mean'):
        model = small()
        with torch.no_grad(): model.state_dict()[name].fill_(float('nan'))
        refused('the model at the start', model, checkpoint_dir=tmp_path)
        assert rounds(tmp_path) == -1
    bad = dict(small().state_dict(), **{'0.1.bias': torch.full((4,), float('nan'))})
    refused('state to rewind to', rewind=bad)

@pytest.mark.parametrize('given', ['much', [1, 2], torch.ones(2), object()])
def test_a_training_that_reports_no_number(given):
    refused('give a number', train=lambda model: dict(loss=given))

# --- whose folder is it -------------------------------------------------------------------------------------

def test_two_runs_do_not_share_a_folder(tmp_path):
    model, before = small(), digest(small())
    with lock_folder(tmp_path/'run'): refused('Another run is at work', model, checkpoint_dir=tmp_path/'run')
    def nested(net, round): imp(model, noise, checkpoint_dir=tmp_path/'run', **KW)
    refused('Another run is at work', train=nested, checkpoint_dir=tmp_path/'run')
    assert digest(model) == before
    assert len(imp(model, noise, checkpoint_dir=tmp_path/'run', **KW)[1]) == 4, 'the folder is free again'

def test_a_run_belongs_to_the_weights_that_it_began_with(tmp_path):
    stopped(tmp_path, rewind='start')
    other, before = small(seed=1), digest(small(seed=1))
    refused('began with other weights', other, checkpoint_dir=tmp_path, rewind='start')
    assert digest(other) == before and rounds(tmp_path) == 1

def test_a_run_rewinds_to_its_own_start(tmp_path):
    "The start of another run of the same settings is put in the place of this one's."
    def early(iters): return lambda model: noise(model, 0, iters)
    stopped(tmp_path/'a', rewind=early(1))
    stopped(tmp_path/'b', rewind=early(2))
    stopped(tmp_path/'c', model=small(seed=1), rewind=early(1))
    model, before = small(), digest(small())
    for other, told in (('b', 'belongs to another run'), ('c', 'began with other weights')):
        shutil.copy(tmp_path/other/'start.safetensors', tmp_path/'a'/'start.safetensors')
        refused(told, model, checkpoint_dir=tmp_path/'a', rewind=early(1))
    (tmp_path/'a'/'start.safetensors').unlink()
    refused('the run cannot rewind', model, checkpoint_dir=tmp_path/'a', rewind=early(1))
    assert digest(model) == before

def test_what_a_dead_writer_left_is_swept(tmp_path):
    orphan = tmp_path/'.imp-0123abcd.part.safetensors'
    orphan.write_bytes(b'half')
    imp(small(), noise, checkpoint_dir=tmp_path, **KW)
    assert listed(tmp_path) == ['.lock', 'imp.safetensors', 'settings.json']

def test_another_place_of_work_is_told(tmp_path):
    "Sums of other numbers of threads differ in their last bits."
    stopped(tmp_path)
    def threads(tensors, meta): meta['ran'] = json.dumps(dict(json.loads(meta['ran']), threads=99))
    rewritten(tmp_path/'imp.safetensors', threads)
    with pytest.warns(UserWarning, match="'threads': 99"):
        mask, _ = imp(small(), noise, checkpoint_dir=tmp_path, **KW)
    assert mask.info['threads'] == torch.get_num_threads() and mask.info['device'] == 'cpu'

# --- damaged and forged files -------------------------------------------------------------------------------

def first(prefix, tensors): return next(name for name in tensors if name.startswith(prefix) and tensors[name].ndim)

def other(prefix, change):
    "A forger of the first tensor of a kind."
    def forge(tensors, meta): tensors[first(prefix, tensors)] = change(tensors[first(prefix, tensors)])
    return forge

def without(prefix): return lambda tensors, meta: tensors.pop(first(prefix, tensors))
def more(name, tensor): return lambda tensors, meta: tensors.update({name: tensor})
def told(**texts): return lambda tensors, meta: meta.update(texts)
def untold(name): return lambda tensors, meta: meta.pop(name)

def history(change):
    "A forger of the rows of the history."
    def forge(tensors, meta):
        rows = json.loads(meta['history'])
        change(rows)
        meta['history'] = json.dumps(rows)
    return forge

FORGED = {
    'a mask that is too short': other('mask/', lambda t: t[:-1]),
    'a mask that is too long': other('mask/', lambda t: torch.cat([t, t])),
    'a mask of numbers': other('mask/', lambda t: t.float()),
    'another mask': other('mask/', lambda t: t ^ 128),
    'a layer without a mask': without('mask/'),
    'a mask without a layer': more('mask/x', torch.zeros(1, dtype=torch.uint8)),
    'NaN among the weights': other('model/', lambda t: t*float('nan')),
    'infinity among the weights': other('model/', lambda t: t*float('inf')),
    'weights of int8': other('model/', lambda t: t.to(torch.int8)),
    'weights of another shape': other('model/', lambda t: t[:1]),
    'complex weights': other('model/', lambda t: t.to(torch.complex64)),
    'a tensor that is missing': without('model/'),
    'a tensor that is unknown': more('model/x', torch.zeros(1)),
    'a tensor of no kind': more('x', torch.zeros(1)),
    'another memory of the training': more('train/x', torch.zeros(1)),
    'too few rounds': history(lambda rows: rows.pop()),
    'too many rounds': history(lambda rows: rows.extend(rows*9)),
    'another density': history(lambda rows: rows[0].update(density=.79)),
    'rounds of another order': history(lambda rows: rows[0].update(round=1)),
    'no threshold': history(lambda rows: rows[0].pop('threshold')),
    'words in the history': history(lambda rows: rows[0].update(loss='low')),
    'a row that is a list': history(lambda rows: rows.append([1])),
    'no history': untold('history'), 'no start': untold('ran'), 'no version': untold('version'),
    'other settings': told(settings='{}'), 'settings that are none': told(settings='[1'),
    'another kind of file': told(format='opentrans-mask'),
    'a newer version': told(version='3'), 'an older version': told(version='1'),
    'a version in words': told(version='two'),
}

@pytest.fixture(scope='module')
def half_run(tmp_path_factory):
    "The folder of a run that was left in its second round."
    folder = tmp_path_factory.mktemp('half')
    stopped(folder, train=Remembers(), rewind='start')
    return folder

@pytest.mark.parametrize('what', FORGED)
def test_forged_checkpoints_are_refused_as_a_whole(half_run, tmp_path, what):
    "The checksum fits, the contents do not: one sentence, and neither model nor training is changed."
    shutil.copytree(half_run, tmp_path/'run')
    rewritten(half_run/'imp.safetensors', FORGED[what], tmp_path/'run'/'imp.safetensors')
    model = small()
    keeper = Remembers()
    before = digest(small())
    file = (tmp_path/'run'/'imp.safetensors').read_bytes()
    said = refused('run', model, keeper, checkpoint_dir=tmp_path/'run', rewind='start')
    assert len(said) < 1500
    assert digest(model) == before and torch.equal(keeper.sum, torch.zeros(2))
    assert (tmp_path/'run'/'imp.safetensors').read_bytes() == file, 'the file is left for a closer look'

def reads_run(folder, name, model, path):
    "Go on with a run one of whose files is another."
    if path != folder/name: shutil.copy(path, folder/name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        mask, history = imp(model, Remembers(), checkpoint_dir=folder, rewind='start', **KW)
    return mask, history.drop(columns='seconds')

@pytest.mark.parametrize('name', ['imp.safetensors', 'start.safetensors'])
def test_mutated_files_of_a_run(half_run, tmp_path, name):
    """Flipped bits, cuts, insertions, other contents under a right checksum: refused with nothing changed, or the
    same."""
    folder = tmp_path/'run'
    shutil.copytree(half_run, folder)
    good = tmp_path/name
    shutil.copy(half_run/name, good)
    def read(model, path):
        shutil.copy(half_run/'imp.safetensors', folder/'imp.safetensors')
        return reads_run(folder, name, model, path)
    def same(found): return digest(dict(found[0].items()), found[1].to_dict('list'))
    told = check_reader(good, read, small, digest, same, COUNT)
    assert told['refused'] > COUNT/3

def old_mask_file(mask, path):
    "A mask file as version 0.1 wrote it."
    bits = {n: pack_bits(m) for n, m in mask.items()}
    share = {n: round(float(m.float().mean()), 6) for n, m in mask.items()}
    layers = {n: dict(shape=list(m.shape), kept=int(m.sum()), density=share[n]) for n, m in mask.items()}
    meta = dict(format='opentrans-mask', version='1', density=f'{mask.density:.6f}')
    meta.update(layers=json.dumps(layers), info=json.dumps(mask.info))
    save_file(bits, path, metadata=dict(meta, sha256=_digest(meta, bits)))

def same_mask(mask): return digest(dict(mask.items()), mask.info)

@pytest.mark.parametrize('version', [1, 2])
def test_mutated_mask_files(tmp_path, version):
    mask = SparseMask.magnitude(small(), .3)
    good = tmp_path/'m.safetensors'
    mask.save(good) if version == 2 else old_mask_file(mask, good)
    assert SparseMask.load(good) == mask and SparseMask.load(good).info == mask.info, 'masks of 0.1 are read'
    check_reader(good, lambda _, path: SparseMask.load(path), same=same_mask, count=COUNT)

def test_mutated_baked_files(tmp_path):
    mask, good = SparseMask.magnitude(small(), .3), tmp_path/'b.safetensors'
    mask.bake(small(), good)
    for read in (load_baked, read_checkpoint):
        check_reader(good, lambda _, path: read(path), same=digest, count=COUNT)

def test_baked_files_of_the_first_version_are_read(tmp_path):
    mask, model = SparseMask.magnitude(small(), .3), small()
    mask.bake(model, tmp_path/'new.safetensors')
    tensors, meta = load_tensors(tmp_path/'new.safetensors')
    save_file(tensors, tmp_path/'old.safetensors', metadata=dict(meta, version='1'))
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in load_baked(tmp_path/'old.safetensors').items())

def test_baked_files_hold_numbers(tmp_path):
    mask = SparseMask.magnitude(small(), .3)
    mask.bake(small(), tmp_path/'b.safetensors')
    def spoil(tensors, meta): tensors['4.bias'] = tensors['4.bias']*float('nan')
    rewritten(tmp_path/'b.safetensors', spoil)
    with pytest.raises(OpenTransError, match='no numbers'): load_baked(tmp_path/'b.safetensors')
    model = small()
    with torch.no_grad(): model[4].bias.fill_(float('nan'))
    before = digest(model)
    with pytest.raises(OpenTransError, match='not finite'): mask.bake(model, tmp_path/'c.safetensors')
    assert digest(model) == before and not (tmp_path/'c.safetensors').exists()

def test_checkpoints_of_the_first_version_are_refused_in_one_sentence(tmp_path):
    meta = dict(format='opentrans-imp', settings={}, history=[])
    save_tensors({'model/0.0.weight': torch.ones(1)}, tmp_path/'imp.safetensors', meta)
    refused('format 1; this opentrans reads from 2 on', checkpoint_dir=tmp_path)

# --- one mask, one file; and files of others ----------------------------------------------------------------

def test_one_mask_gives_one_file(tmp_path):
    "Saved twice, loaded and saved again, and by processes whose dictionaries and sets hash otherwise."
    mask = SparseMask.magnitude(small(), .3)
    info = dict(of={'b', 'a', 'c'}, train=noise, when=None, made=object())
    for name in 'ab': mask.save(tmp_path/name, **info)
    SparseMask.load(tmp_path/'a').save(tmp_path/'c')
    work = """import torch
torch.set_num_threads(1)
from test_runs import *
SparseMask.magnitude(small(), .3).save('d', of={'b', 'a', 'c'}, train=noise, when=None, made=object())"""
    subprocess.run([sys.executable, '-c', work], env=dict(ENV, PYTHONHASHSEED='7'), cwd=tmp_path, check=True)
    assert len({(tmp_path/name).read_bytes() for name in 'abcd'}) == 1

@pytest.mark.parametrize('suffix', ['.pkl', '.pth', '.safetensors'])
def test_masks_go_onto_detectron2_pickles(tmp_path, suffix):
    "Weights as detectron2's zoo has them: a pickle of arrays under its names, read without running code."
    net = tiny_resnet()
    mask = SparseMask.magnitude(net, .2)
    spelled = {}
    for name, tensor in net.state_dict().items():
        new = name.replace('downsample.0.', 'shortcut.')
        for i in range(1, 5): new = new.replace(f'layer{i}.', f'res{i+1}.')
        spelled[f'backbone.{"stem." if new.startswith("conv") else ""}{new}'] = tensor.numpy()
    (tmp_path/'r50.pkl').write_bytes(pickle.dumps(dict(model=spelled, __author__='zoo', matching_heuristics=True)))
    whole, left = transfer_checkpoint(mask, tmp_path/'r50.pkl', tmp_path/f'out{suffix}')
    back = read_checkpoint(tmp_path/f'out{suffix}')
    back = back.get('model', back)
    assert not left and whole['__author__'] == 'zoo' and set(back) == set(spelled)
    net.load_state_dict(dict(zip(net.state_dict(), (back[name] for name in spelled))))
    assert zeros(mask, net), 'the pruned weights are zero, under their own names'

def test_masks_go_onto_baked_files(tmp_path):
    mask, other = SparseMask.magnitude(small(), .5), SparseMask.random(small(), .5, seed=1)
    mask.bake(small(), tmp_path/'b.safetensors')
    whole, left = transfer_checkpoint(other, tmp_path/'b.safetensors', tmp_path/'out.pth')
    both = mask & other
    assert not left and all(torch.equal(whole[n] != 0, both[n]) for n in mask)
    assert torch.equal(torch.load(tmp_path/'out.pth', weights_only=True)['4.weight'], whole['4.weight'])

# --- no room on the disk ------------------------------------------------------------------------------------

FULL = textwrap.dedent('''
    import resource, signal
    import torch
    from opentrans.core import OpenTransError
    from opentrans.pruning import SparseMask, imp, transfer_checkpoint
    from test_runs import KW, noise, small
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mask, model = SparseMask.magnitude(small(), .3), small()
    def transfer(suffix): return lambda: transfer_checkpoint(mask, model.state_dict(), f't.{suffix}')
    works = dict(mask=lambda: mask.save('m.safetensors', note='x'*5000),
                 baked=lambda: mask.bake(model, 'b.safetensors'),
                 transfer=transfer('safetensors'), pth=transfer('pth'), pkl=transfer('pkl'),
                 imp=lambda: imp(model, noise, checkpoint_dir='run', **KW))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    for name, work in works.items():
        try: work()
        except OpenTransError as error:
            said = str(error)[:90].replace(chr(10), ' ')
            print(name, error.exit_code, said, flush=True)
''')

def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    "Files may not grow beyond 1,500 bytes: a sentence, exit code 1, whole old files, and nothing half-written."
    mask, model = SparseMask.magnitude(small(), .5), small()
    mask.save(tmp_path/'m.safetensors')
    mask.bake(model, tmp_path/'b.safetensors')
    for suffix in ('safetensors', 'pth', 'pkl'):
        transfer_checkpoint(mask, model.state_dict(), tmp_path/f't.{suffix}')
    stopped(tmp_path/'run')
    old = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    r = forked('-c', FULL, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    lines = r.stdout.splitlines()
    names = ('mask', 'baked', 'transfer', 'pth', 'pkl', 'imp')
    assert [line.split()[:2] for line in lines] == [[name, '1'] for name in names], r.stdout
    assert all('Cannot write' in line for line in lines)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == old

NO_LARGE_FILES = """
import resource, runpy, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
runpy.run_module('opentrans.cli', run_name='__main__')
"""

def test_the_command_on_a_full_disk_exits_1(tmp_path):
    (tmp_path/'m.safetensors').write_bytes(b'what was there')
    r = forked('-c', NO_LARGE_FILES, *'prune --method magnitude --out m.safetensors'.split(),
               cwd=tmp_path)
    assert r.returncode == 1 and 'error: Cannot write' in r.stderr, r.stderr[-2000:]
    assert 'Traceback' not in r.stderr
    assert (tmp_path/'m.safetensors').read_bytes() == b'what was there'

# --- numbers ------------------------------------------------------------------------------------------------

BAD = [(dict(p=1e-12), '10,000 rounds'), (dict(p=1e-300), '10,000 rounds'), (dict(p='0.1'), 'p must be a number'),
       (dict(density=float('nan')), 'density must be'), (dict(seed=-1), 'seed=-1'),
       (dict(seed=1.5), 'whole number'), (dict(seed=True), 'whole number'), (dict(seed=None), 'whole number'),
       (dict(schedule=.5), 'list of densities'), (dict(schedule=[.5]*10_001), 'at most 10,000'),
       (dict(schedule=[.5, float('nan')]), 'a density of the schedule'), (dict(rewind='end'), 'rewind must be'),
       (dict(rewind={'0.0.weight': 'x'}), 'lacks')]

@pytest.mark.parametrize('kw,told', BAD)
def test_numbers_of_imp_are_checked_before_anything_is_done(tmp_path, kw, told):
    refused(told, checkpoint_dir=tmp_path/'run', **kw)
    assert not (tmp_path/'run').exists()

FLAGS = ['--p 1e-12', '--p 0', '--p nan', '--density nan', '--iters 0', '--iters -3', '--lr nan', '--lr inf',
         '--lr -1', '--batch-size 0', '--crop 1', '--crop 3']

@pytest.mark.parametrize('flag', FLAGS)
def test_numbers_of_the_command_end_in_one_sentence(tmp_path, flag):
    said = fails('prune', '--out', tmp_path/'m.safetensors', *flag.split())
    assert 'must be' in said or 'give a finite number' in said or '--p' in flag
    assert not list(tmp_path.iterdir()), 'nothing is written'

def test_a_criterion_that_draws_numbers_is_part_of_the_round(tmp_path):
    "Its numbers come from the seed of the round, too, so that a break changes nothing."
    def drawn(model, losses=None, **kw):
        return {n: torch.rand(w.shape) for n, w in SparseMask.ones(model).weights(model).items()}
    with seeded(1): whole, _ = imp(small(), noise, criterion=drawn, **KW)
    with seeded(2): stopped(tmp_path, criterion=drawn)
    with seeded(3): again, _ = imp(small(), noise, criterion=drawn, checkpoint_dir=tmp_path, **KW)
    assert again == whole
