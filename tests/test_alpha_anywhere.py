"""Alpha of any weights: files and shards, differences, adapters, several threads; and how sure it is. References
are models read whole, merged weights, and loops."""
import copy, json, math, os, subprocess, sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from torch import nn
from opentrans.errors import OpenTransError
from opentrans.heavy_tail import (
    adapters, analyze, fit_power_law, hill, LayerTable, Null, plateau, WeightFiles)

pytestmark = pytest.mark.usefixtures('one_thread')
root = Path(__file__).resolve().parent.parent

def net(seed=0, widths=(48, 64, 48, 96)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a,b in zip(widths, widths[1:])])

def same(a, b, columns=None):
    columns = columns or [c for c in a.frame if c not in ('solver',)]
    pd.testing.assert_frame_equal(a.frame[columns], b.frame[columns], check_exact=False, rtol=1e-9)

# Files

@pytest.fixture(params=['safetensors', 'shards', 'pth', 'pth in a state_dict', 'folder of bin'])
def stored(request, tmp_path):
    "A state dict in one of the forms that files have."
    tensors = ({n: t.detach() for n,t in net().named_parameters()}
               | {'norm.weight': torch.ones(9), 'conv.weight': torch.randn(40, 30, 3, 3)})
    if request.param == 'safetensors':
        save_file(tensors, tmp_path/'w.safetensors')
        return tensors,tmp_path/'w.safetensors'
    if request.param == 'shards':
        names = list(tensors)
        for i,part in enumerate((names[:3], names[3:])):
            save_file({n: tensors[n] for n in part}, tmp_path/f'model-0000{i+1}-of-00002.safetensors')
        (tmp_path/'config.json').write_text('{}')
        return tensors,tmp_path
    if request.param == 'folder of bin':
        torch.save(tensors, tmp_path/'pytorch_model.bin')
        return tensors,tmp_path
    torch.save(tensors if request.param == 'pth'
               else dict(state_dict={f'module.{n}': t for n,t in tensors.items()}, epoch=3), tmp_path/'w.pth')
    return tensors,tmp_path/'w.pth'

def test_files_are_read_as_the_tensors_in_them(stored):
    tensors,path = stored
    whole,files = analyze(tensors, xmin='median'),analyze(WeightFiles(path), xmin='median')
    same(whole, LayerTable([files.spectra[n] for n in whole], 'median'))
    assert set(files) == set(whole) and not files.unread

def test_what_files_hold_besides_layers(tmp_path):
    torch.manual_seed(0)
    tied = torch.randn(200, 32)
    lstm = nn.LSTM(32, 40).state_dict()
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(32, 48)).state_dict()
    tensors = {'transformer.wte.weight': tied, 'lm_head.weight': tied,
               'h.0.attn.c_attn.weight': torch.randn(32, 96), 'h.0.norm.weight': torch.ones(32),
               'h.0.mlp.experts.gate_up_proj': torch.randn(4, 32, 64),
               'q.qweight': torch.randint(0, 9, (32, 32), dtype=torch.int32),
               'int8.weight': torch.randint(-9, 9, (32, 32), dtype=torch.int8),
               'patch_embed.proj.weight': torch.randn(40, 3, 8, 8), **{f'rnn.{n}': t for n,t in lstm.items()},
               **{f'normed.{n}': t for n,t in weight_norm.items()}}
    torch.save(tensors, tmp_path/'w.pth')
    t = analyze(WeightFiles(tmp_path/'w.pth'), skip=())
    assert set(t) == {'h.0.attn.c_attn.weight', 'h.0.mlp.experts.gate_up_proj', 'q.qweight', 'int8.weight',
                      'patch_embed.proj.weight', 'rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'normed.weight'}
    assert (t.frame.kind['h.0.mlp.experts.gate_up_proj'] == 'experts'
            and t.frame.kind['rnn.weight_hh_l0'] == 'recurrent')
    assert t.frame.reason[['q.qweight', 'int8.weight']].str.contains('integer codes').all()
    assert (t.unread['lm_head.weight'] == "is the same tensor as 'transformer.wte.weight'"
            and 'embedding' in t.unread['transformer.wte.weight'])
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 48))
    normed.load_state_dict(weight_norm)
    assert np.allclose(t.spectra['normed.weight'].evals, analyze(normed, skip=()).spectra['weight'].evals,
                       rtol=1e-5)
    words = analyze(WeightFiles(tmp_path/'w.pth'), skip=(), embeddings=True)
    assert words.frame.kind['transformer.wte.weight'] == 'embedding'

def test_gpt2_from_its_folder_and_as_a_model(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=100, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    files,whole = analyze(WeightFiles(tmp_path)),analyze(model)
    for n in whole:
        # a file does not say that three projections are packed; and a tied head is the embedding
        if '[' in n or n.startswith('lm_head'): continue
        assert np.isclose(whole.frame.alpha[n], files.frame.alpha[n]), n
    assert {n.partition('[')[0] for n in whole} - {'lm_head.weight'} <= set(files)
    assert not [n for n in files if 'wte' in n or 'wpe' in n]

def test_files_that_are_none(tmp_path):
    for make in (lambda: WeightFiles(tmp_path), lambda: WeightFiles(tmp_path/'no.pth')):
        with pytest.raises(OpenTransError): make()
    (tmp_path/'w.safetensors').write_bytes(b'\x10'*30)
    with pytest.raises(OpenTransError): WeightFiles(tmp_path/'w.safetensors')
    (tmp_path/'w.pth').write_bytes(b'not a pickle')
    with pytest.raises(OpenTransError): WeightFiles(tmp_path/'w.pth')

class Evil:
    def __reduce__(self): return (os.system, ('touch /tmp/opentrans-was-here',))

def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({'a.weight': torch.randn(9, 9), 'b': Evil()}, tmp_path/'w.pth')
    with pytest.raises(OpenTransError): WeightFiles(tmp_path/'w.pth')
    assert not Path('/tmp/opentrans-was-here').exists()

MEMORY = """
import resource, sys, torch
from opentrans.heavy_tail import analyze, WeightFiles
torch.set_num_threads(1)
analyze({'a.weight': torch.randn(64, 64)}, skip=())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
analyze(WeightFiles(sys.argv[1]), xmin='median', skip=(), threads=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)
"""

@pytest.mark.slow
def test_memory_is_that_of_the_largest_layers(tmp_path):
    """Sixteen shards, 1 GB in all: what is added stays far below the half of that. (A shard that was read is a map
    of the disk, and may go any time.)"""
    for i in range(16):
        save_file({f'{i}.{j}.weight': torch.randn(256, 16384) for j in range(4)}, tmp_path/f'w{i}.safetensors')
    done = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path)], capture_output=True, text=True,
                          check=True, cwd=root)
    assert float(done.stdout) < 500

# Several threads

@pytest.mark.parametrize('threads', [2, 3])
def test_threads_change_nothing(threads):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(a, b, k)
                            for a,b,k in ((32, 64, 3), (64, 64, 1), (64, 48, 3), (48, 48, 3), (48, 100, 1))],
                          *[nn.Linear(40, n) for n in (40, 80, 33)])
    nn.init.zeros_(model[2].weight)
    one,several = (analyze(model, skip=(), null=Null('shuffle', 2), threads=n) for n in (1, threads))
    pd.testing.assert_frame_equal(one.frame, several.frame)
    with pytest.raises(OpenTransError): analyze(model, threads=0)

def test_large_networks_in_batches(monkeypatch):
    "What is solved together does not depend on how many layers wait."
    from opentrans.heavy_tail.spectra import _Queue
    model = net(widths=(32,)*8)
    whole = analyze(model, skip=())
    init = _Queue.__init__
    monkeypatch.setattr(_Queue, '__init__', lambda self, *a: init(self, *a, most=1500))
    same(whole, analyze(model, skip=()))

# Differences

def test_a_difference_is_the_difference():
    before = net()
    after = copy.deepcopy(before)
    change = {f'{i}.weight': 10**-i*torch.randn_like(layer.weight) for i,layer in enumerate(after)}
    with torch.no_grad():
        for i,layer in enumerate(after): layer.weight += change[f'{i}.weight']
    found,true = analyze(after, base=before, skip=()),analyze(change, skip=())
    for n in found: assert np.allclose(found.spectra[n].evals, true.spectra[n].evals, rtol=1e-3, atol=1e-6)
    same(analyze(after, base=before.state_dict(), skip=()), found)
    same(analyze(after.state_dict(), base=before.state_dict(), skip=()), found)
    assert found.options['base'] == 'Sequential'

@pytest.mark.parametrize('xmin', ['ks', 'median'])
def test_alpha_of_a_difference_does_not_depend_on_its_size(xmin):
    "A smaller learning rate makes a smaller change, and no other spectrum."
    before = nn.Linear(64, 64, bias=False).double()
    change = torch.randn(64, 64, dtype=torch.float64)
    alphas = []
    for size in (1., 1e-2, 1e-3, 1e-4):
        after = copy.deepcopy(before)
        with torch.no_grad(): after.weight += size*change
        t = analyze(after, xmin, base=before, skip=())
        assert t.frame.n_evals.item() == 64 and t.frame.reason.item() == ''
        alphas.append(t.frame.alpha.item())
    assert np.allclose(alphas, alphas[0], rtol=1e-4), alphas

def test_what_did_not_change_or_is_not_there():
    before,after = net(),net()
    with torch.no_grad(): after[1].weight += .1
    t = analyze(after, base={n: w for n,w in before.state_dict().items() if n != '2.weight'}, skip=())
    assert (t.frame.reason['0.weight'] == 'nothing has changed'
            and 'no layer of this name' in t.frame.reason['2.weight'] and t.frame.n_evals['1.weight'] == 1)
    other = analyze(after, base=net(widths=(48, 60, 48, 96)), skip=())
    assert 'another shape' in other.frame.reason['0.weight']

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('rank', [2, 20])
def test_digits_that_are_lost_are_no_eigenvalues(dtype, rank):
    "A change of some rank is found to have it, if it is well above rounding."
    before = nn.Linear(128, 128, bias=False)
    change = torch.randn(128, rank)@torch.randn(rank, 128)*.3/math.sqrt(rank)
    after = copy.deepcopy(before)
    with torch.no_grad(): after.weight += change
    t = analyze(after.to(dtype), base=before.to(dtype), skip=())
    assert t.frame.n_evals.item() == rank

# Adapters

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(64, 64)
        self.up = nn.Linear(64, 128)
        self.conv = nn.Conv2d(16, 32, 3)
    def forward(self, x): return self.up(self.q(x))

@pytest.mark.parametrize('adapter', ['default', 'two'])
def test_adapters_of_peft(adapter, tmp_path):
    peft = pytest.importorskip('peft')
    from safetensors.torch import load_file
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=['q', 'up', 'conv'], init_lora_weights=False)
    model = peft.get_peft_model(Block(), config)
    before = {n.replace('.base_layer', ''): p.detach().clone()
              for n,p in model.named_parameters() if 'base_layer.weight' in n}
    merged = {f'base_model.model.{n}': p.detach()
              for n,p in copy.deepcopy(model).merge_and_unload().named_parameters()}
    delta,whole = adapters(model),adapters(model, 'merged')
    assert set(delta) == {f'base_model.model.{n}.weight' for n in ('q', 'up', 'conv')}
    for n in delta:
        assert (torch.allclose(whole[n], merged[n], atol=1e-5)
                and torch.allclose(delta[n].float(), merged[n]-before[n], atol=1e-5))
    assert analyze(delta).frame.n_evals.max() <= 8*9
    model.save_pretrained(tmp_path)
    from_file = adapters(load_file(tmp_path/'adapter_model.safetensors'), scaling=4)
    assert set(from_file) == {n.removeprefix('base_model.model.')
                              for n in delta if 'conv' not in n} | {'conv.weight'}
    for n in ('q.weight', 'up.weight'):
        assert torch.allclose(from_file[n].float(), delta[f'base_model.model.{n}'], atol=1e-5)

def test_adapters_of_this_package():
    from opentrans.vit.peft import add_lora, merge_peft
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(attn=nn.MultiheadAttention(32, 4), up=nn.Linear(32, 64)))
    before = {n: p.detach().clone() for n,p in model.named_parameters()}
    handle = add_lora(model, r=3, seed=0)
    with torch.no_grad():
        for part in handle.parts.values(): part.B.normal_()
    delta,whole = adapters(model),adapters(model, 'merged')
    merge_peft(model)
    for n in delta:
        key,_,third = n.partition('[')
        rows = slice(None) if not third else slice(32*'qkv'.index(third[0]), 32*('qkv'.index(third[0])+1))
        now = dict(model.named_parameters())[key]
        assert (torch.allclose(whole[n], now[rows], atol=1e-5)
                and torch.allclose(delta[n], now[rows]-before[key][rows], atol=1e-5))
    assert len(delta) == 5

def test_adapters_that_are_none():
    for bad in (lambda: adapters(nn.Linear(3, 3)), lambda: adapters({'a.lora_A.weight': torch.ones(2, 3)}),
                lambda: adapters(nn.Linear(3, 3), 'both'),
                lambda: adapters({'a.lora_A.weight': torch.ones(2, 3), 'a.lora_B.weight': torch.ones(3, 2)},
                                 'merged')):
        with pytest.raises(OpenTransError): bad()

def test_compare_has_intervals():
    a,b = analyze(net(0), skip=()),analyze(net(1), skip=())
    c,wide = a.compare(b),a.compare(b, level=.99)
    error = np.hypot(a.frame.sigma, b.frame.sigma)
    assert (np.allclose(c.high-c.change, 1.959964*error) and np.allclose(c.change-c.low, 1.959964*error)
            and (wide.low < c.low).all())
    with pytest.raises(OpenTransError): a.compare(b, level=1)

# How sure

@given(st.lists(st.floats(.01, 1000), min_size=6, max_size=60, unique=True))
def test_hill_as_a_loop(values):
    x = np.sort(values)[::-1]
    h = hill(values)
    for row in h.itertuples():
        k = row.k
        assert np.isclose(row.alpha, 1 + k/sum(math.log(x[i]/x[k]) for i in range(k)))
    p = plateau(h, least=3)
    if p['high']:
        ends = h[h.k.isin([p['low'], p['high']])]
        assert p['ratio'] == p['high']/p['low'] and (abs(ends.alpha-p['alpha']) <= 2*ends.sigma*(1+1e-9)).all()

def test_a_plateau_is_where_the_power_law_is():
    rng = np.random.default_rng(0)
    # alpha 3 above 1, something else below
    tail = (1-rng.random(3000))**(-1/2)
    mixed = plateau(hill(np.concatenate([tail, rng.random(20_000)])))
    assert abs(mixed['alpha']-3) < .3 and mixed['high'] < 4500
    assert math.isnan(plateau(hill([1., 2., 3.]))['alpha'])
    with pytest.raises(OpenTransError): hill([1., -2., 3.])

@pytest.mark.parametrize('share', ['5%', '25%', '50%', '100%'])
def test_a_share_is_that_many_of_the_largest(share):
    x = np.sort(np.random.default_rng(0).pareto(2, 400)+1)
    f = fit_power_law(x, share)
    n = max(2, math.ceil(float(share[:-1])*4))
    assert f.n_tail == n and f.xmin == x[-n] and np.isclose(f.alpha, 1+n/np.log(x[-n:]/x[-n]).sum())
    if share == '50%': assert f.alpha == fit_power_law(x, 'median').alpha
    for bad in ('0%', '120%', '%', 'ten%'):
        with pytest.raises(OpenTransError): fit_power_law(x, bad)

def plain_clip(x, fit):
    first = fit(x)
    for i in range(2, 10):
        f = fit(x[:-i])
        if f.alpha + 1 < first.alpha: return f
        if f.alpha <= 2: break
    return first

def test_clip_leaves_out_fingers():
    rng = np.random.default_rng(3)
    for _ in range(20):
        x = np.sort(np.concatenate([rng.random(200)+1, rng.random(3)*30+20*rng.integers(0, 2)]))
        f,true = fit_power_law(x, 'clip'),plain_clip(x, fit_power_law)
        assert (f.alpha, f.xmin, f.n) == (true.alpha, true.xmin, true.n) and f.method == 'clip'
    t = analyze(net(), xmin='clip', skip=())
    assert t.select().rule.endswith('xmin by clip') and t.refit('25%').frame.n_tail.tolist() == [12, 12, 12]

def test_weightwatchers_clip():
    pytest.importorskip('weightwatcher')
    from weightwatcher.RMT_Util import fit_clipped_powerlaw
    rng = np.random.default_rng(1)
    for _ in range(5):
        x = np.sort(np.concatenate([rng.pareto(4, 300)+1, rng.random(3)*300]))
        best,_,_ = fit_clipped_powerlaw(x)
        assert np.isclose(best.alpha, fit_power_law(x, 'clip').alpha, rtol=1e-6)

def test_intervals_cover():
    "Of 60 samples of a power law, alpha lies inside the interval of nearly all."
    rng,inside = np.random.default_rng(0),0
    for i in range(60):
        low,high = fit_power_law((1-rng.random(200))**(-1/1.5), 1.).interval(.9, 60, seed=i)
        inside += low <= 2.5 <= high
    assert 45 <= inside
    assert all(map(math.isnan, fit_power_law([1., 1., 1.]).interval()))
    t = analyze(net(), skip=())
    found = t.intervals(n=20)
    assert list(found.index) == list(t) and (found.low <= found.high).all()

def test_rules_and_undecided_layers():
    t = analyze(net(widths=(48, 64, 48, 96, 48, 30, 90)), skip=())
    rules = ('ks', 'median', 'peak')
    told = t.rules(rules)
    frozen = [set(t.refit(r).select().freeze) for r in rules]
    for n in t:
        count = sum(n in f for f in frozen)
        assert told.frozen_by[n] == count and told.undecided[n] == (0 < count < 3)
    for r in rules: assert told[r].tolist() == t.refit(r).frame.alpha.rank().astype(int).tolist()
    assert np.allclose(told.attrs['agreement'],
                       pd.DataFrame({r: t.refit(r).frame.alpha for r in rules}).corr('spearman'))
    every,some = set.intersection(*frozen),set.union(*frozen)
    assert (set(t.select_agreed(rules=rules).freeze) == every
            and set(t.select_agreed(rules=rules, undecided='freeze').freeze) == some)
    assert set(t.select_agreed(rules=rules, undecided='majority').freeze) == {
        n for n in t if sum(n in f for f in frozen) > 1}
    with pytest.raises(OpenTransError): t.select_agreed(undecided='maybe')

# The command

def command(*args):
    "`opentrans` in this process: exit code, and what it wrote."
    import contextlib, io
    from opentrans.cli import main
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    sys.argv = ['opentrans', *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return code,out.getvalue(),err.getvalue()

def test_the_command_reads_anything(tmp_path):
    tensors = {n: t.detach() for n,t in net().named_parameters()}
    save_file(tensors, tmp_path/'w.safetensors')
    true = analyze(tensors, xmin='median', null='gaussian')
    for source in (tmp_path/'w.safetensors', tmp_path, f'hf:{tmp_path}'):
        code,out,err = command('alpha', source, '--xmin', 'median', '--by', 'z', '--json')
        assert code == 0, err
        rows = json.loads(out)
        assert {n: r['frozen'] == 'yes' for n,r in rows.items()} == {
            n: n in true.select(by='z').freeze for n in true}
        assert all(math.isclose(r['z'], true.frame.z[n], rel_tol=1e-6) for n,r in rows.items())
    code,out,err = command('alpha', tmp_path/'w.safetensors', '--null', 'mp', '--aspect', '1')
    assert code == 0 and 'look untrained' in out
    other = {n: t + .1 for n,t in tensors.items()}
    save_file(other, tmp_path/'base.safetensors')
    code,out,_ = command('alpha', tmp_path/'w.safetensors', '--base', tmp_path/'base.safetensors', '--json',
                         '--by', 'random')
    assert code != 0 or all(r['n_evals'] <= 1 for r in json.loads(out).values())

def test_the_command_and_models_of_other_libraries():
    code,out,err = command('alpha', 'torchvision:resnet18', '--pretrained', 'none')
    assert code == 0 and 'look untrained' in out and 'layer4.1.conv2.weight' in out, err
    for bad in (('torchvision:resnet18',), ('torchvision:resnet18', '--pretrained', 'DEFAULT'),
                ('torchvision:resnet17', '--pretrained', 'none'), ('hf:nowhere',), ('none.safetensors',),
                ('timm:no_such_net', '--pretrained', 'none'), ('shapes-rn', '--null', 'normal')):
        code,out,err = command('alpha', *bad)
        assert code == 2 and err.startswith('error: ') and 'Traceback' not in err, (bad, err)

def test_an_option_out_of_its_bounds_is_named():
    code,out,err = command('alpha', 'shapes-rn', '--aspect', '.5')
    assert code == 2 and "'--aspect'" in err and 'greater than or equal to 1' in err and 'Traceback' not in err, err

def test_words():
    said = analyze(net(), null='gaussian', xmin='median', skip=()).words()
    assert 'look untrained' in said and '3 layers' in said
    trained = net(widths=(200, 300, 400))
    with torch.no_grad():
        for layer in trained:
            layer.weight += (
                torch.randn(len(layer.weight), 30)@torch.diag(torch.arange(30.)/60)@torch.randn(
                    30, layer.in_features))
    assert 'look trained' in analyze(trained, null='gaussian', xmin='median', skip=()).words()
    empty = net()
    for layer in empty: nn.init.zeros_(layer.weight)
    assert 'No fit' in analyze(empty, skip=()).words()
    plain = analyze(net(), skip=()).words()
    assert 'Median alpha' in plain and 'times as long as wide' in plain
    assert 'times as long as wide' not in analyze(net(), skip=(), aspect=1.).words()

def test_transfer_chooses_by_z(monkeypatch):
    "The step of the commands that reads alpha and chooses."
    import contextlib
    from types import SimpleNamespace
    import opentrans.training
    from opentrans.cli.training import _tune
    from opentrans.clip import ClipBackbone
    seen = []
    monkeypatch.setattr(opentrans.training, 'finetune',
                        lambda seg, train, recipe, selection=None, **k: seen.append(selection))
    seg = SimpleNamespace(backbone=ClipBackbone.create('shapes-rn'))
    choose = dict(freeze=.5, by='z', xmin='median', seed=0, alpha_of='dense')
    with contextlib.ExitStack() as stack: chosen = _tune(seg, None, None, None, None, choose, None, {}, stack)
    assert seen == [chosen] and chosen == analyze(seg.backbone, xmin='median', null='gaussian').select(by='z')

def test_a_wrong_name_among_a_thousand_is_told_in_one_sentence():
    code,_,err = command('alpha', 'timm:resnet15', '--pretrained', 'none')
    assert code == 2 and 'resnet152' in err and len(err) < 400, err
