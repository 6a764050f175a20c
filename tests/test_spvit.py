"""SPViT across modules: hybrids inside ClipBackbone, frameworks, masks and spectra; random towers; broken files;
the experiment's script."""
import itertools, json, os, re, types
from dataclasses import asdict
from pathlib import Path
import numpy as np
import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from mutations import check_reader, digest
from torch import nn
from opentrans.clip import ClipBackbone, small_clip
from opentrans.errors import OpenTransError
from opentrans.core import layers
from opentrans.files import load_json
from opentrans.cost import cost
from opentrans.errors import OtherRun
from opentrans.files import load_tensors, not_finite
from opentrans.frameworks import build
from opentrans.heavy_tail import analyze
from opentrans.pruning import SparseMask
from opentrans.vit.spvit import SPVIT_OPS, UnifiedAttention, UnifiedDepthwise, UnifiedMLP
from opentrans.vit.hybrids import convert_to_spvit, HybridSpec, slim_spvit, SPVIT_PUBLISHED, SPViTCost, vit_blocks
from opentrans.vit.search import embedding_loss, train_spvit

root = Path(__file__).resolve().parent.parent
CONFIG = dict(embed_dim=16, vision_cfg=dict(image_size=48, patch_size=8, width=24, head_width=8, layers=4),
              text_cfg=dict(context_length=12, width=32, heads=2, layers=1),
              tokens=['a</w>', 'photo</w>', 'of</w>', '.</w>', 'red</w>', 'blue</w>', 'star</w>'])

def backbone(seed=0):
    model,tok = small_clip(CONFIG, seed=seed)
    return ClipBackbone.from_model(model, tok, 'tiny-vit')

def stirred(model, seed):
    "Scores and norms that are not those of the beginning."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, UnifiedAttention) and m.z is not None:
                for t in (m.z, *m.norms.parameters(), *(b for b in m.norms.buffers() if b.is_floating_point())):
                    t.copy_(torch.rand(t.shape, generator=g)+.5)
    return model

@settings(max_examples=25, deadline=None)
@given(heads=st.sampled_from([1, 2, 3]), grid=st.tuples(st.integers(2, 5), st.integers(2, 5)),
       ops=st.sampled_from([o for r in (1, 2, 3, 4) for o in itertools.combinations(SPVIT_OPS, r)]),
       gating=st.sampled_from(['exclusive', 'nested']), cls=st.sampled_from(['pass', 'zero']),
       seed=st.integers(0, 1000))
def test_gates_and_slimmed_model_agree(heads, grid, ops, gating, cls, seed):
    """Any candidates, any gates, any grid: the layer under search in eval equals what it is slimmed to, and exactly
    one operation has weight 1."""
    torch.manual_seed(seed)
    u = UnifiedAttention.from_attention(torch.nn.MultiheadAttention(6*heads, heads, batch_first=True).eval(), grid,
                                        ops, gating, cls=cls, temperature=.5)
    with torch.no_grad(): u.gate.copy_(torch.randn(len(ops)-1))
    x = torch.randn(2, 1+grid[0]*grid[1], 6*heads)
    torch.testing.assert_close(u(x, x, x)[0], u.slim()(x, x, x)[0], atol=1e-5, rtol=1e-5)
    open_gates = [o for o,g in zip(ops[1:], u.gate) if g > 0]
    if gating == 'exclusive': assert u.op() == (open_gates[-1] if open_gates else ops[0])
    else: assert u.op() == ops[next((i for i,g in enumerate(u.gate) if g <= 0), len(ops)-1)]

def random_hybrid(clip, seed=0):
    model,rng = convert_to_spvit(clip, temperature=.5),np.random.default_rng(seed)
    for m in model.modules():
        if isinstance(m, UnifiedAttention): m.set_op(rng.choice(m.ops))
        if isinstance(m, UnifiedMLP): m.keep(np.flatnonzero(rng.random(m.hidden) < .5))
    return stirred(model, seed)

@pytest.mark.parametrize('seed', range(3))
def test_hybrid_is_a_clip_backbone(seed):
    """All that a ClipBackbone is asked for, on pictures of another shape than its own, from the gated and the
    slimmed tower alike."""
    clip = backbone()
    gated = random_hybrid(clip, seed)
    thin = slim_spvit(gated)
    x,regions = torch.rand(2, 3, 40, 64),[torch.zeros(2, 40, 64, dtype=torch.bool) for _ in range(2)]
    for r in regions: r[0, :20], r[1, 20:] = True, True
    with torch.no_grad():
        for f in (lambda m: m(x)['res4'], lambda m: m.dense_embeddings(x), lambda m: m.encode_image(x),
                  lambda m: m.region_embeddings(x, regions)):
            torch.testing.assert_close(f(gated), f(thin), atol=1e-5, rtol=1e-5)
        e = thin.region_embeddings(x, regions)
    assert (
        e[0]-e[1]).norm() > 1e-3, 'two regions of a picture must not have one embedding: the last attention stays'
    assert thin.text is clip.text and SPViTCost(thin).flops(thin) < SPViTCost(clip).flops(clip)

def test_search_without_labels_transfers_to_a_framework(tmp_path):
    """Search by distillation, write architecture and weights, build them in a fresh tower, put a framework on top:
    it trains and its tower is the hybrid."""
    clip = backbone()
    images = torch.rand(12, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    teacher = clip.fresh_copy().requires_grad_(False)
    model,count = convert_to_spvit(clip),SPViTCost(clip)
    dense = count.target
    count.target,count.weight = .6*dense,10/dense**2
    history = train_spvit(model, lambda i: images[i % 3*4:][:4], 40,
                          embedding_loss(teacher, lambda m, x: m.dense_embeddings(x)), count, lr=1e-3, gate_lr=.2)
    assert history.gflops.iloc[-1] < .8*dense <= history.gflops.iloc[0]
    spec,thin = HybridSpec.of(model, 'found'),slim_spvit(model)
    spec.to_json(tmp_path/'spec.json')
    other = HybridSpec.from_json(tmp_path/'spec.json').build(backbone(seed=3))
    other.visual.load_state_dict(thin.visual.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.dense_embeddings(images[:2]), thin.dense_embeddings(images[:2]))
    seg = build('deeplabv3', other, vocabulary=['red star', 'blue star'], preset='small')
    loss = sum(seg.loss(dict(images=images[:4], labels=torch.randint(0, 2, (4, 48, 48)))).values())
    loss.backward()
    assert (loss.isfinite()
            and all(p.grad is not None for b in list(vit_blocks(other).values())[:-1] for p in b.mlp.parameters()))
    assert seg.predict(images[:1], ['red', 'blue', 'star']).shape == (1, 48, 48)

# --- beside the published code

REFERENCE = os.environ.get('OPENTRANS_SPVIT', '')

@pytest.fixture(scope='module')
def reference():
    """The search code of ziplab/SPViT for DeiT, whose folder OPENTRANS_SPVIT names, on the CPU and with today's
    timm."""
    file = Path(REFERENCE)/'SPViT_DeiT'/'models_pruning.py'
    if not REFERENCE or not file.exists():
        pytest.skip('OPENTRANS_SPVIT does not name a folder with a clone of ziplab/SPViT')
    source = file.read_text().replace('.cuda()', '')
    for a,b in (('from timm.models.layers import', 'from timm.layers import'),
                ('from timm.models.vision_transformer import _cfg', '_cfg = dict'),
                ('from timm.models.registry import register_model', 'register_model = lambda f: f'),
                ('from params import args', '')):
        source = source.replace(a, b)
    module = types.ModuleType('models_pruning')
    exec(compile(source, str(file), 'exec'), module.__dict__)
    return module

@pytest.mark.parametrize('heads,temperature', [(3, .01), (3, 1.), (6, .5)])
def test_layers_are_the_references(reference, heads, temperature):
    """For all patterns of gates, with random weights, biases, scores and norms: layer under search and slimmed
    layer give what the published layer gives; its scores go column by column, ours row by row."""
    torch.manual_seed(0)
    c = 8*heads
    theirs = reference.UnifiedAttention(c, num_heads=heads, qkv_bias=True, window_size=(4, 4), alpha=temperature,
                                        theta=1.5).eval()
    with torch.no_grad():
        for p in theirs.parameters(): p.copy_(torch.randn_like(p)*.4)
        for bn in (theirs.bn_1x1, theirs.bn_3x3):
            bn.running_mean.normal_()
            bn.running_var.uniform_(.5, 2.)
    plain = timm.layers.Attention(c, heads, qkv_bias=True).eval()
    plain.load_state_dict(
        {**{f'qkv.{k}': torch.cat([getattr(theirs.qk, k), getattr(theirs.v, k)]) for k in ('weight', 'bias')},
         **{f'proj.{k}': getattr(theirs.proj, k) for k in ('weight', 'bias')}})
    ours = UnifiedAttention.from_attention(plain, (4, 4), gating='nested', temperature=temperature)
    for o,bn in (('conv1', theirs.bn_1x1), ('conv3', theirs.bn_3x3)): ours.norms[o].load_state_dict(bn.state_dict())
    x,seen = torch.randn(2, 17, c),set()
    with torch.no_grad():
        ours.z.copy_(theirs.head_probs.unflatten(1, (3, 3)).mT.flatten(1))
        for gates in itertools.product((-1., 1.), repeat=3):
            theirs.kernel_thresholds.copy_(torch.tensor(gates))
            ours.gate.copy_(torch.tensor(gates))
            seen.add(ours.op())
            want = theirs(x)[0]
            if ours.op() == 'skip': assert not want.any() # also of the class token
            for layer in (ours, ours.slim()): torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)
    assert seen == set(SPVIT_OPS)

def test_mlp_is_the_references(reference):
    torch.manual_seed(0)
    theirs = reference.UnifiedMlp(12, 48, theta=1.5).eval()
    plain = timm.layers.Mlp(12, 48)
    plain.load_state_dict({k: t for k,t in theirs.state_dict().items() if k.startswith('fc')})
    ours = UnifiedMLP.from_mlp(plain.eval())
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        theirs.ffn_thresholds.normal_()
        ours.gate.copy_(theirs.ffn_thresholds)
        torch.testing.assert_close(ours(x), theirs(x)[0])
        assert len(ours.kept()) == theirs(x)[1] == ours.slim().fc1.out_features

@pytest.mark.parametrize('name', SPVIT_PUBLISHED)
def test_published_specs_are_the_files(reference, name):
    "Operations and numbers of units out of the code's own files."
    found = dict(deit_ti='SPViT_DeiT/config/spvit_deit_ti_l200_t10_ft.json',
                 deit_s='SPViT_DeiT/config/spvit_deit_sm_l30_t32_ft.json',
                 deit_b='SPViT_DeiT/config/spvit_deit_bs_l008_t60_ft.json',
                 deit_b_light='SPViT_DeiT/config/spvit_deit_bs_l006_t100_ft.json',
                 swin_ti='SPViT_Swin/configs/spvit_swin_tn_l28_t32_ft.yaml',
                 swin_s='SPViT_Swin/configs/spvit_swin_sm_l04_t55_ft.yaml',
                 swin_b='SPViT_Swin/configs/spvit_swin_bs_l01_t100_ft.yaml')[name]
    text = (Path(REFERENCE)/found).read_text()
    gates = np.array(re.findall(r'\[([01.]+), ([01.]+), ([01.]+)\]', text), float)
    units = torch.load(Path(REFERENCE)/found.split('/')[0]/re.search(r'ffn_indicators/[^"\']+', text)[0],
                       map_location='cpu', weights_only=True)['model']
    spec = HybridSpec.published(name)
    assert (spec.ops == [SPVIT_OPS[int(g.cumprod().sum())] for g in gates]
            and spec.units == [int((u != 0).sum()) for u in units.values()])

# --- what a hybrid is to the rest

@pytest.mark.parametrize('kind', ['deit_ti', 'registers', 'no class token', 'clip', 'clip on a trunk'])
def test_towers_of_the_libraries(kind):
    """Models that timm and open_clip build: converted they are the source, slimmed they are the gated ones, and the
    count knows their tokens."""
    torch.manual_seed(0)
    if kind == 'deit_ti': model = timm.create_model('deit_tiny_patch16_224', num_classes=7)
    elif kind == 'registers':
        model = timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3,
                                              num_classes=4, reg_tokens=3, init_values=.1, qk_norm=True)
    elif kind == 'no class token':
        model = timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3,
                                              num_classes=4, class_token=False, global_pool='avg')
    elif kind == 'clip':
        config = dict(embed_dim=32,
                      vision_cfg=dict(image_size=64, patch_size=16, width=64, head_width=32, layers=3),
                      text_cfg=dict(context_length=12, vocab_size=64, width=32, heads=2, layers=1))
        model = open_clip.CLIP(**config, quick_gelu=True)
    else:
        model = open_clip.timm_model.TimmModel('test_vit', embed_dim=8, image_size=160, pool='', proj='linear',
                                               pretrained=False)
    model = model.eval()
    side = dict(deit_ti=224).get(kind, 160 if 'trunk' in kind else 64)
    call = (lambda m, x: m.encode_image(x)) if kind == 'clip' else (lambda m, x: m(x))
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(call(convert_to_spvit(model), x), call(model, x), atol=1e-5, rtol=1e-4)
        rng,gated = np.random.default_rng(0),stirred(convert_to_spvit(model), 0)
        for m in gated.modules():
            if isinstance(m, UnifiedAttention): m.set_op(rng.choice(m.ops))
            if isinstance(m, UnifiedMLP): m.keep(np.flatnonzero(rng.random(m.hidden) < .5))
        thin = slim_spvit(gated)
        torch.testing.assert_close(call(gated, x), call(thin, x), atol=1e-5, rtol=1e-4)
    count = SPViTCost(model, size=(side, side))
    assert count.flops(gated).item() == count.flops(thin).item() < count.flops(model).item()

def test_names_of_what_stays():
    """Layers that a hybrid keeps have the names of the dense tower, so that masks and tables join on them; new ones
    are the convolutions alone."""
    clip = backbone()
    spec = HybridSpec(['conv3', 'skip', 'msa', 'msa'], [50, 60, 70, 96])
    thin = spec.build(clip)
    dense,names = {layer.name for layer in layers(clip)},{layer.name for layer in layers(thin)}
    assert names - dense == {f'transformer.resblocks.0.attn.{k}.weight' for k in ('conv', 'out')}
    assert all(n.startswith(('transformer.resblocks.0.attn', 'transformer.resblocks.1.attn')) for n in dense-names)

def test_masks_spectra_and_cost_of_a_hybrid():
    clip = backbone()
    thin = HybridSpec(['conv3', 'conv1', 'msa', 'msa'], [50, 60, 70, 96]).build(clip)
    mask = SparseMask.magnitude(thin.visual, .3)
    assert 'transformer.resblocks.0.attn.conv.weight' in mask.names and abs(mask.density-.3) < 1e-3
    removed = ~mask['transformer.resblocks.0.attn.conv.weight']
    with mask.apply(thin):
        assert (thin.visual.transformer.resblocks[0].attn.conv.weight[removed] == 0).all()
    row = analyze(thin.visual).to_frame()
    assert 'transformer.resblocks.0.attn.conv.weight' in row.index
    hand = SPViTCost(thin).table(thin)
    # the hand count against the counter that runs the model
    run = cost(thin.visual, (3, 48, 48))
    assert hand.values.sum() - hand.norm.sum() + sum(2*24*w for w in (50, 60, 70, 96)) == run.macs

def test_hybrid_refuses_another_tower():
    spec = HybridSpec(['msa']*4, [[0, 1]]*4, hidden=[96]*4)
    cfg = {**CONFIG, 'vision_cfg': {**CONFIG['vision_cfg'], 'width': 32}}
    other = ClipBackbone.from_model(*small_clip(cfg, seed=0), 'wider')
    with pytest.raises(OpenTransError, match='found on another tower'): spec.build(other)
    with pytest.raises(OpenTransError, match='no blocks'): spec.build(ClipBackbone.create('shapes-rn'))

def test_broken_files(tmp_path):
    clip,images = backbone(),torch.rand(4, 3, 48, 48)
    spec = HybridSpec(['msa']*4, [9]*4)
    spec.to_json(tmp_path/'s.json')
    (tmp_path/'cut.json').write_text((tmp_path/'s.json').read_text()[:30])
    with pytest.raises(OpenTransError, match='not a hybrid'): HybridSpec.from_json(tmp_path/'cut.json')
    with pytest.raises(OpenTransError, match='Cannot read'): HybridSpec.from_json(tmp_path/'none.json')
    def run(**kw):
        return train_spvit(convert_to_spvit(clip), lambda i: images, 2,
                           embedding_loss(clip, lambda m, x: m.dense_embeddings(x)), SPViTCost(clip),
                           checkpoint=tmp_path/'c.safetensors', checkpoint_every=1, **kw)
    run()
    whole = (tmp_path/'c.safetensors').read_bytes()
    (tmp_path/'c.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(OpenTransError, match='not a whole safetensors file'): run()

def test_experiment_is_resumable(tmp_path):
    "The study 'spvit' at its smallest: all arms, costs that meet, and a second call that reads what is there."
    from opentrans.experiments import run_study
    made = run_study('spvit', tmp_path, seeds=1, scale='smoke')
    flops = {row['arm']: row['gflops'] for row in made['results'] if row['arm'] != 'dense'}
    assert abs(flops['random architecture']/flops['SPViT'] - 1) < .03
    def times(): return {p: p.stat().st_mtime_ns for p in (tmp_path/'.runs'/'smoke'/'spvit').glob('0-*.json')}
    before = times()
    assert (run_study('spvit', tmp_path, seeds=1, scale='smoke')['results'] == made['results'] and len(before) == 6
            and times() == before)

def test_committed_experiment():
    "Five seeds of every arm, compared at equal cost, with command, date and versions."
    from opentrans.vit import spvit_study as exp
    d = load_json(root/'docs'/'results'/'spvit-5seeds.json')
    assert ({'command', 'date', 'processor', 'torch', 'cpu_minutes'} <= set(d['run'])
            and d['seeds'] == list(range(5)))
    rows = {(r['arm'], r['seed']): r for r in d['results']}
    assert (set(rows) == {(a, s) for a in ('dense', *exp.ARMS) for s in d['seeds']}
            and d['settings']['set'] == json.loads(json.dumps(exp.SET)))
    for (arm,seed),r in rows.items():
        meets = exp.ARMS.get(arm, (0,)*5)[4]
        if isinstance(meets, str): assert abs(r['gflops']/rows[meets, seed]['gflops'] - 1) < .04, (arm, seed)

def test_benchmark_runs(script):
    b = script('bench_spvit')
    nets = b.models('deit_ti', 'cpu')
    r = b.bench(nets, 1, 224, 1, 'cpu')
    assert (r['dense']['peak_bytes'] > 0 and r['time_ratio'] > 0
            and sum(t.numel() for t in nets['spvit'].parameters()) == 4_774_808)

def test_committed_benchmark():
    """The stored run: DeiT-S slimmed by the published spec is faster than DeiT-S at every batch, by a margin that
    the quartiles do not bridge at batch 1."""
    d = load_json(root/'benchmarks'/'bench_spvit.json')
    assert ((d['flops']['spvit'], d['params']['spvit']) == (3_346_503_936, 15_870_724)
            and {'date', 'threads', 'torch', 'machine'} <= set(d))
    assert (all(r['time_ratio'] < .9 and r['memory_ratio'] < 1 for r in d['runs'])
            and d['runs'][0]['spvit']['quartiles'][1] < d['runs'][0]['dense']['quartiles'][0])

# --- files, batches and models that are not as they should be

def tiny(seed=0):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2,
                                         num_classes=3)

HYBRID = HybridSpec(['conv1', 'msa'], [[0, 3, 5], 7], [48, 48], [None, [1]], 'a "name"', 'nested', .5, 'zero')

def test_damaged_and_forged_hybrids_are_refused(tmp_path):
    """What is read can be built or says by one sentence why not; what is only damaged is never read as something
    else."""
    path = tmp_path/'hybrid.json'
    HYBRID.to_json(path)
    def read(target, file):
        spec = HybridSpec.from_json(file)
        try: spec.gates(convert_to_spvit(tiny(), heads=True))
        except OpenTransError: pass
        return spec
    check_reader(path, read, same=repr)

def test_hybrids_of_opentrans_0_1_still_load():
    text = json.dumps(dict(kind='opentrans.spvit', **asdict(HYBRID)))
    assert HybridSpec.from_json(text) == HYBRID == HybridSpec.from_json(HYBRID.to_json())
    by_hand = json.dumps(dict(ops=['conv1', 'msa'], units=[[0, 3, 5], 7]))
    assert HybridSpec.from_json(by_hand).widths == [3, 7]
    for change in (dict(heads=[None, [1, 0]]), dict(heads=[None, [-1]]), dict(temperature=0), dict(gating='x'),
                   dict(cls='x'), dict(hidden=[48, -1]), dict(units=[[0, 3, 99], 7]), dict(more=1)):
        with pytest.raises(OpenTransError, match='not a hybrid'):
            HybridSpec.from_json(json.dumps({**asdict(HYBRID), **change}))

def test_gates_are_set_whole_or_not_at_all():
    "Every block is looked at before the first is changed."
    model = convert_to_spvit(tiny(), heads=True)
    before = digest(model)
    for ops, units, heads, why in ((['conv1', 'dw3'], [3, 7], None, "operation in block 'blocks.1'"),
                                   (['conv1', 'msa'], [3, 99], None, 'which has 48'),
                                   (['conv1', 'msa'], [3, 7], [None, [5]], 'has head 5')):
        with pytest.raises(OpenTransError, match=why): HybridSpec(ops, units, heads=heads).gates(model)
    assert digest(model) == before
    plain = convert_to_spvit(tiny(), units=False)
    with pytest.raises(OpenTransError, match='Convert the model with units=True'):
        HybridSpec(['conv1', 'msa'], [3, 48]).gates(plain)
    with pytest.raises(OpenTransError, match='Convert the model with heads=True'):
        HybridSpec(['conv1', 'msa'], [48, 48], heads=[None, [0]]).gates(plain)

def search(model, path=None, steps=2, images=torch.linspace(-1, 1, 2*3*16*16).view(2, 3, 16, 16),
           labels=torch.tensor([0, 2]), **kw):
    return train_spvit(model, lambda i: (images, labels), steps, checkpoint=path, checkpoint_every=1, **kw)

def test_damaged_and_forged_checkpoints_are_refused_whole(tmp_path):
    """A checkpoint of a finished run, so that one that is read trains nothing: the model is that of the run, or as
    it was."""
    path, model = tmp_path/'run.safetensors', convert_to_spvit(tiny())
    history = search(model, path)
    def read(target, file):
        return target, search(target, file)
    check_reader(path, read, lambda: convert_to_spvit(tiny()), digest,
                 lambda told: digest(told[0]) + told[1].to_json())
    assert search(convert_to_spvit(tiny()), path).equals(history)

def test_a_search_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    "Also with clipped gradients, which are a setting like the others; another setting is another run."
    class Stop(Exception): pass
    def stopping(i):
        if i == 3: raise Stop
        return images, labels
    images = torch.rand(2, 3, 16, 16)
    labels = torch.tensor([0, 2])
    count = SPViTCost(tiny())
    kw = dict(cost=SPViTCost(tiny(), .5*count.target), clip_grad=1.)
    one, two = convert_to_spvit(tiny()), convert_to_spvit(tiny())
    whole = search(one, None, 5, images, labels, **kw)
    with pytest.raises(Stop):
        train_spvit(two, stopping, 5, checkpoint=tmp_path/'run.safetensors', checkpoint_every=1, **kw)
    three = convert_to_spvit(tiny())
    again = search(three, tmp_path/'run.safetensors', 5, images, labels, **kw)
    assert digest(one) == digest(three) and whole.equals(again)
    for change in (dict(clip_grad=2.), dict(lr=1.), dict(cost=None)):
        with pytest.raises(OtherRun, match='had other settings'):
            search(convert_to_spvit(tiny()), tmp_path/'run.safetensors', 5, images, labels, **{**kw, **change})
    with pytest.raises(OtherRun, match='gates'):
        search(convert_to_spvit(tiny(), gating='nested'), tmp_path/'run.safetensors', 5, images, labels, **kw)

def test_a_diverged_search_keeps_the_last_good_checkpoint(tmp_path):
    """The loss of a step is checked, and the weights before they are written; the run can be taken up from where it
    was good."""
    path, images = tmp_path/'run.safetensors', torch.rand(2, 3, 16, 16)
    def batch(i): return images*(float('nan') if i == 1 else 1), torch.tensor([0, 2])
    with pytest.raises(OpenTransError, match='The loss is nan'):
        train_spvit(convert_to_spvit(tiny()), batch, 3, checkpoint=path, checkpoint_every=1)
    tensors, meta = load_tensors(path)
    assert meta['step'] == '1' and not not_finite(tensors)
    good = path.read_bytes()
    broken = convert_to_spvit(tiny())
    broken.blocks[1].norm1.weight.data[0] = float('inf')
    with pytest.raises(OpenTransError, match='not finite.*no checkpoint is written'):
        train_spvit(broken, lambda i: None, 1, lambda m, b: m.head.weight.sum(),
                    checkpoint=tmp_path/'new.safetensors')
    assert not (tmp_path/'new.safetensors').exists() and path.read_bytes() == good
    with pytest.raises(OpenTransError, match='after the last step'):
        train_spvit(broken, lambda i: None, 1, lambda m, b: m.head.weight.sum())

def test_a_second_search_on_the_same_file_waits_outside(tmp_path):
    "It is refused while the first one lives; a file beside it is free."
    path, images = tmp_path/'run.safetensors', torch.rand(2, 3, 16, 16)
    def batch(i):
        with pytest.raises(OtherRun, match='Another run is at work on'): search(convert_to_spvit(tiny()), path)
        search(convert_to_spvit(tiny()), tmp_path/'other.safetensors')
        return images, torch.tensor([0, 2])
    train_spvit(convert_to_spvit(tiny()), batch, 1, checkpoint=path)
    search(convert_to_spvit(tiny()), tmp_path/'third.safetensors')

def test_batches_and_numbers_of_a_search_are_checked():
    "One sentence each, with no weight changed."
    model, images = convert_to_spvit(tiny()), torch.rand(2, 3, 16, 16)
    before = digest(dict(model.named_parameters()))
    for x, y, why in (((images*255).byte(), [0, 2], 'torch.uint8'), (images, [0, 3], 'the model has 3 classes'),
                      (images, [0], 'give labels of')):
        with pytest.raises(OpenTransError, match=why): search(model, images=x, labels=torch.tensor(y))
    for kw, why in ((dict(steps=0), 'iterations=0'), (dict(steps=1.5), 'iterations=1.5'), (dict(lr=-1), 'lr=-1'),
                    (dict(lr=float('nan')), 'lr=nan'), (dict(gate_lr=-1), 'gate_lr=-1'),
                    (dict(weight_decay=-1), 'weight_decay=-1'), (dict(clip_grad=-1), 'clip_grad=-1'),
                    (dict(seed=.5), 'seed=0.5')):
        with pytest.raises(OpenTransError, match=why): search(model, **kw)
    with pytest.raises(OpenTransError, match='checkpoint_every=0'):
        train_spvit(model, lambda i: None, 1, checkpoint_every=0)
    with pytest.raises(OpenTransError, match='No parameter of the model learns'):
        search(convert_to_spvit(tiny().requires_grad_(False), units=False, ops=('msa',)))
    assert digest(dict(model.named_parameters())) == before
    for kw, why in ((dict(target=0), 'target=0'), (dict(weight=-1), 'weight=-1'), (dict(size=(0, 16)), 'size=0'),
                    (dict(size=(16,)), 'height, width')):
        with pytest.raises(OpenTransError, match=why): SPViTCost(tiny(), **kw)
    for kw, why in ((dict(temperature=0), 'temperature=0'), (dict(theta=float('nan')), 'theta=nan'),
                    (dict(keep=(9,)), 'keep=9')):
        with pytest.raises(OpenTransError, match=why): convert_to_spvit(tiny(), **kw)

def test_only_weights_that_can_be_cut_are_given_gates():
    """GPT-2's maps lie the other way round, a parametrised weight is computed anew in each call, and codes are no
    weights."""
    from transformers.pytorch_utils import Conv1D
    gpt2 = nn.Sequential()
    gpt2.add_module('c_fc', Conv1D(12, 6))
    gpt2.add_module('c_proj', Conv1D(6, 12))
    with pytest.raises(OpenTransError, match='not an MLP of two linear maps'): UnifiedMLP.from_mlp(gpt2)
    def changed(name, change):
        model = tiny()
        change(model.get_submodule(name))
        return model
    def quantize(layer): layer.weight = nn.Parameter((layer.weight*50).to(torch.int8), requires_grad=False)
    def parametrise(layer): nn.utils.parametrizations.weight_norm(layer)
    for name in ('blocks.0.mlp.fc1', 'blocks.1.attn.proj', 'blocks.1.attn.qkv'):
        with pytest.raises(OpenTransError, match='holds codes of a quantized layer'):
            convert_to_spvit(changed(name, quantize))
        with pytest.raises(OpenTransError, match='has no weight of its own'):
            convert_to_spvit(changed(name, parametrise))
    with pytest.raises(OpenTransError, match='pads with other values'):
        UnifiedDepthwise.from_conv(nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode='reflect'))

def test_the_name_of_a_hybrid_is_a_name():
    "A title may look like a formula."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    HybridSpec(['msa', 'skip'], [3, 4], name='$x_{$').plot(hidden=[8, 8]).figure.canvas.draw()
    plt.close('all')
