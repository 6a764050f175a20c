"Masks across modules, libraries, files and processes: what the notebook's cells do not reach."
import copy, json, os, struct
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from opentrans.errors import OpenTransError
from opentrans.files import save_tensors
from opentrans.files import pack_bits
from opentrans.core import layers
from opentrans.pruning import (
    cubic_schedule, SparseMask, export_onnx, imp, load_baked, prunable, transfer_checkpoint)
from forked import python, two_processes

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.usefixtures('one_thread')

def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
def small(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(conv(3, width), conv(width, 2*width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(2*width, 3))
def zeros(mask, model): return all((w[~mask[n]] == 0).all() for n,w in mask.weights(model).items())
def untouched(a, b, names=()): return all(torch.equal(t, b[k]) for k,t in a.items() if k not in names)

# --- the towers of open_clip

@pytest.fixture(scope='module')
def rn50():
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    # as open_clip's RN50.json says
    return ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64)

def test_rn50_follows_the_released_convention(rn50, tmp_path):
    """54 of the trunk's 55 convolutions (targets.md A: 23,474,016 weights, conv1 864 of them); 52 in the loading
    variant; a file of at most 3.2 MB."""
    mask = SparseMask.magnitude(rn50, .1)
    assert (len(mask) == 54 and mask.total == 23_474_016-864 and 'conv1.weight' not in mask
            and not any('attnpool' in n for n in mask))
    assert abs(mask.density-.1) < 1e-6 and mask['layer1.0.conv1.weight'].shape == rn50.layer1[0].conv1.weight.shape
    w = np.concatenate([layer.weight.detach().abs().numpy().ravel() for layer in prunable(rn50)])
    kept = np.concatenate([m.numpy().ravel() for _,m in mask.items()])
    # an independent global threshold
    assert (kept == (w > np.partition(w, len(w)-mask.kept-1)[len(w)-mask.kept-1])).all()
    assert len(mask.only('layer*')) == 52
    mask.save(tmp_path/'m.safetensors', backbone='RN50')
    assert (tmp_path/'m.safetensors').stat().st_size <= 3.2e6 and SparseMask.load(tmp_path/'m.safetensors') == mask
    matched = SparseMask.random(rn50, .1, seed=0, like=mask)
    assert ((matched.table().kept == mask.table().kept).all()
            and abs(matched.overlap(mask).loc['all', 'lift']-1) < .02)
    report = mask.bake(rn50)
    # the attention pool (14.8 M) stays dense
    assert report['dense_bytes'] > 4*38_316_896 and report['sparse_bytes'] < .5*report['dense_bytes']

@pytest.mark.parametrize('name,count,total,first',
                         [('RN101', 105, 42_413_056, 'conv2.weight'), ('RN50x4', 84, 65_508_800, 'conv2.weight'),
                          ('RN50x16', 126, 136_007_424, 'conv2.weight'),
                          ('convnext_base', 111, 87_391_872, 'trunk.stages.0.blocks.0.conv_dw.weight'),
                          ('convnext_large_d', 111, 195_968_448, 'trunk.stages.0.blocks.0.conv_dw.weight'),
                          ('ViT-B-16', 72, 84_934_656, 'transformer.resblocks.0.attn.in_proj_weight[q]'),
                          ('ViT-L-14', 144, 301_989_888, 'transformer.resblocks.0.attn.in_proj_weight[q]')])
def test_prunable_rule_on_every_tower(name, count, total, first):
    """Convolutions and linear maps with q, k, v; first layer, norms, biases, embeddings, pooling and head left
    alone. Built without memory."""
    open_clip = pytest.importorskip('open_clip')
    tower = open_clip.create_model(name, pretrained=None, device='meta').visual
    found = prunable(tower)
    assert (len(found), sum(layer.weight.numel() for layer in found), found[0].name) == (count, total, first)
    assert all(layer.weight.ndim >= 2 and 'embed' not in layer.name and 'norm' not in layer.name
               and '.bias' not in layer.name for layer in found)

# --- spellings of other libraries, checked by what the models compute

def tiny_resnet():
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    return ModifiedResNet(layers=(1, 2, 1, 1), output_dim=16, heads=4, image_size=32, width=8)

def test_mask_fits_timm_resnet_by_function():
    """open_clip's ResNet under a mask and timm's CLIP ResNet with the same weights under the same mask give the
    same features."""
    pytest.importorskip('timm')
    from dataclasses import replace
    from timm.models import byobnet
    cfg = byobnet.model_cfgs['resnet50_clip']
    cfg = replace(cfg, stem_chs=(4, 4, 8),
                  blocks=tuple(replace(b, d=d, c=b.c//8) for b,d in zip(cfg.blocks, (1, 2, 1, 1))))
    ours,other = tiny_resnet(),byobnet.ByobNet(cfg, num_classes=16, img_size=32)
    other.load_state_dict(byobnet.checkpoint_filter_fn({f'visual.{k}': t for k,t in ours.state_dict().items()},
                                                       other), strict=False)
    mask = SparseMask.magnitude(ours, .3)
    for m in (ours, other):
        m.eval()
        assert len(mask.apply(m).placed) == len(mask) == 21
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        y = ours.stem(x)
        for layer in (ours.layer1, ours.layer2, ours.layer3, ours.layer4): y = layer(y)
        assert torch.allclose(y, other.forward_features(x), atol=1e-4*y.abs().max().item())
    back = SparseMask.magnitude(other, .1)                                                # and the other way round
    with back.apply(ours): assert zeros(back, ours) and 'stages.0.0.conv1_1x1.conv.weight' in back

def tiny_vit():
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch_size=8, width=24, layers=2, heads=2, mlp_ratio=2,
                             output_dim=12).eval()

def test_mask_fits_timm_vit_by_function():
    pytest.importorskip('timm')
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
    ours = tiny_vit()
    other = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2,
                              num_classes=12, pre_norm=True, norm_layer=nn.LayerNorm).eval()
    other.load_state_dict(checkpoint_filter_fn({f'visual.{k}': t for k,t in ours.state_dict().items()}, other),
                          strict=False)
    mask = SparseMask.magnitude(ours, .4)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(ours(x), other(x), atol=1e-4)
    for m in (ours, other): mask.apply(m)
    assert torch.allclose(ours(x), other(x), atol=1e-4)
    # and a mask found there fits here
    assert len(SparseMask.ones(other).apply(ours).placed) == len(mask) == 12

def test_mask_fits_hugging_face_vit_by_function():
    transformers = pytest.importorskip('transformers')
    ours = tiny_vit()
    cfg = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16,
               patch_size=8, hidden_act='gelu', layer_norm_eps=1e-5)
    other = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**cfg)).eval()
    sd,new = ours.state_dict(),{}
    for k in other.state_dict():
        b = k.removeprefix('vision_model.')
        head = {'embeddings.class_embedding': 'class_embedding',
                'embeddings.patch_embedding.weight': 'conv1.weight',
                'embeddings.position_embedding.weight': 'positional_embedding',
                'pre_layrnorm.weight': 'ln_pre.weight', 'pre_layrnorm.bias': 'ln_pre.bias',
                'post_layernorm.weight': 'ln_post.weight', 'post_layernorm.bias': 'ln_post.bias'}
        if b in head:
            new[k] = sd[head[b]]
            continue
        i,rest = b.split('.')[2],'.'.join(b.split('.')[3:])
        at = f'transformer.resblocks.{i}.'
        if rest[10] in 'qkv' and rest.startswith('self_attn.') and 'out' not in rest:
            n = 'qkv'.index(rest[10])
            new[k] = sd[at+('attn.in_proj_weight' if 'weight' in rest else 'attn.in_proj_bias')][24*n:24*(n+1)]
        else:
            new[k] = sd[
                at+rest.replace('self_attn.out_proj', 'attn.out_proj').replace('mlp.fc1', 'mlp.c_fc').replace(
                    'mlp.fc2', 'mlp.c_proj').replace('layer_norm', 'ln_')]
    other.load_state_dict(new)
    mask = SparseMask.magnitude(ours, .4)
    x = torch.randn(2, 3, 16, 16)
    def same(): return torch.allclose(ours(x), other(x).pooler_output @ ours.proj, atol=1e-4)
    assert same()
    for m in (ours, other): mask.apply(m)
    assert same() and zeros(mask, other)
    whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config=cfg,
                                                           text_config=dict(cfg, vocab_size=50, hidden_size=20),
                                                           projection_dim=12))
    text = copy.deepcopy(whole.text_model.state_dict())
    mask.apply(whole)
    # the text tower of the same depth is left alone
    assert zeros(mask, whole) and untouched(text, whole.text_model.state_dict())
    twin = transformers.CLIPModel(transformers.CLIPConfig(vision_config=cfg, text_config=dict(cfg, vocab_size=50),
                                                          projection_dim=12))
    # of the same width too: which one is meant?
    with pytest.raises(OpenTransError, match=r'fit 2 places of the model equally well, at \w'): mask.apply(twin)

def test_mask_fits_convnext_with_and_without_open_clips_trunk():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    inner = timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=0)
    tower = nn.ModuleDict(dict(trunk=inner, head=nn.Linear(8, 4)))
    mask = SparseMask.magnitude(tower, .3)
    assert mask.names[0].startswith('trunk.stages') and len(mask.apply(copy.deepcopy(inner)).placed) == len(mask)
    assert len(SparseMask.ones(inner).apply(tower).placed) == len(mask)

def test_clip_wrappers_checkpoints_and_text_tower(tmp_path):
    """OpenAI's, FC-CLIP's and this package's prefixes, DDP and compile wrappers: found, and nothing beside the
    tower touched."""
    tower = tiny_resnet()
    mask = SparseMask.magnitude(tower, .2)
    for wrap in (lambda t: nn.ModuleDict(dict(visual=t, transformer=nn.Linear(4, 4))),
                 lambda t: nn.ModuleDict(
                     dict(backbone=nn.ModuleDict(dict(clip_model=nn.ModuleDict(dict(visual=t)))),
                          head=nn.Conv2d(8, 8, 1))), lambda t: nn.DataParallel(nn.ModuleDict(dict(backbone=t))),
                 torch.compile, lambda t: nn.ModuleDict(dict(a=torch.compile(t))),
                 lambda t: torch.compile(nn.ModuleDict(dict(visual=t)))):
        model = wrap(copy.deepcopy(tower))
        before = copy.deepcopy(model.state_dict())
        with mask.apply(model) as handle:
            assert zeros(mask, model) and len(handle.placed) == len(mask) and not handle.left
        assert untouched(before, model.state_dict(), {k for k in before if any(k.endswith(n) for n in mask)})
    state = {f'backbone.clip_model.visual._orig_mod.{k}': t for k,t in tower.state_dict().items()}
    torch.save(dict(model=dict(state, other=torch.ones(2)), scheduler=dict(last=3)), tmp_path/'model.pth')
    whole,left = transfer_checkpoint(mask, tmp_path/'model.pth', tmp_path/'out.pth')
    assert (not left and whole['scheduler'] == dict(last=3)
            and sum(not torch.equal(t, whole['model'][k]) for k,t in state.items()) == len(mask))

@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_archives_need_trust(tmp_path):
    net = small().eval()
    mask = SparseMask.magnitude(net, .2)
    torch.jit.trace(net, torch.randn(1, 3, 8, 8)).save(str(tmp_path/'RN.pt'))
    with pytest.raises(OpenTransError, match='trust=True'): transfer_checkpoint(mask, tmp_path/'RN.pt')
    assert (transfer_checkpoint(mask, tmp_path/'RN.pt',
                                trust=True)[0]['1.0.weight'][~mask['1.0.weight']] == 0).all()

# --- round trips

@quick
@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=4), kernel=st.sampled_from([1, 3]),
       attention=st.booleans(), density=st.floats(.01, 1), seed=st.integers(0, 99),
       prefix=st.sampled_from(['', 'visual.', 'module.visual.', 'backbone.clip_model.visual.', 'a.b.c.']),
       kind=st.sampled_from(['global', 'layer', 'random', 'channel']))
def test_round_trip_of_any_model_mask_and_prefix(tmp_path_factory, widths, kernel, attention, density, seed,
                                                 prefix, kind):
    torch.manual_seed(seed)
    net = nn.Sequential(*[nn.Conv2d(i, o, kernel) for i,o in zip([3, *widths], widths)],
                        *([nn.MultiheadAttention(6, 2)] if attention else []), nn.BatchNorm2d(3))
    mask = (SparseMask.random(net, density, seed=seed) if kind == 'random'
            else SparseMask.magnitude(net, density, scope=kind))
    if kind in ('global', 'random'): assert mask.kept == max(1, round(density*mask.total))
    path = tmp_path_factory.mktemp('m')/'m.safetensors'
    mask.save(path)
    again = SparseMask.load(path)
    assert (again == mask and again.names == mask.names and (again & ~again).kept == 0
            and (again | ~again).density == 1)
    model = net
    for part in reversed(prefix.split('.')[:-1]): model = nn.ModuleDict({part: model, 'other': nn.Conv2d(2, 2, 1)})
    before = copy.deepcopy(model.state_dict())
    state = dict(before)
    placed = again.apply_to_state(state)
    again.apply(model).remove()
    hit = {prefix+n.split('[')[0] for n in mask.names}
    assert (set(placed) == hit and untouched(before, model.state_dict(), hit)
            and untouched(state, model.state_dict()) and zeros(mask, model))
    for n in hit:
        assert torch.equal(model.state_dict()[n] != 0,
                           (before[n] != 0) & (whole_mask(mask, n.removeprefix(prefix), before[n].shape)))

def whole_mask(mask, name, shape):
    return mask[name] if name in mask or f'{name}[q]' in mask else torch.ones(shape, dtype=torch.bool)

@quick
@given(a=st.integers(0, 9), b=st.integers(0, 9), d=st.floats(.05, 1), e=st.floats(.05, 1))
def test_mask_algebra(a, b, d, e):
    net = small()
    x,y = SparseMask.random(net, d, seed=a),SparseMask.random(net, e, seed=b)
    assert (~(x & y) == (~x | ~y) and (x & y).kept + (x | y).kept == x.kept + y.kept
            and x.iou(y) == y.iou(x) == pytest.approx((x & y).kept/(x | y).kept))
    assert 0 <= x.overlap(y).iou.min() and (x & x) == x

# --- damaged files

@pytest.fixture(scope='module')
def mask_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('fuzz')/'m.safetensors'
    SparseMask.magnitude(small(), .2).save(path, data='none')
    return path,path.read_bytes(),SparseMask.load(path)

@settings(quick, max_examples=150)
@given(st.data())
def test_fuzzed_mask_files_give_one_clear_error(mask_file, data):
    """Bit flips, cuts, insertions and foreign bytes: the same mask, or an OpenTransError; never another mask, a
    crash or a hang."""
    path,whole,mask = mask_file
    how = data.draw(st.sampled_from(['flip', 'cut', 'insert', 'append', 'zero', 'noise', 'header']))
    b,at = bytearray(whole),data.draw(st.integers(0, len(whole)-1))
    if how == 'flip': b[at] ^= 1 << data.draw(st.integers(0, 7))
    if how == 'cut': b = b[:at]
    if how == 'insert': b[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    if how == 'append': b += data.draw(st.binary(min_size=1, max_size=9))
    if how == 'zero': b[at:at+data.draw(st.integers(1, 99))] = bytes(9)
    if how == 'noise': b = bytearray(data.draw(st.binary(max_size=200)))
    if how == 'header':
        b[:8] = struct.pack('<Q', data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**62, 2**64-1, len(whole)])))
    bad = path.with_name('bad.safetensors')
    bad.write_bytes(bytes(b))
    try: assert SparseMask.load(bad) == mask and bytes(b)[:8] == whole[:8]
    except OpenTransError as e: assert 'bad.safetensors' in str(e)

@pytest.mark.parametrize('change',
                         ['dtype', 'shape', 'huge', 'negative', 'missing', 'extra', 'layers', 'deep', 'info'])
def test_forged_mask_files(mask_file, tmp_path, change):
    "Files with a right checksum and wrong contents: sizes are checked before anything is unpacked."
    from opentrans.pruning import mask as P
    mask = mask_file[2]
    bits = {n: pack_bits(m) for n,m in mask.items()}
    layers = {n: dict(shape=list(m.shape)) for n,m in mask.items()}
    name = mask.names[0]
    if change == 'dtype': bits = {n: b.float() for n,b in bits.items()}
    if change == 'shape': bits[name] = bits[name][:-1]
    if change == 'huge': layers[name]['shape'] = [10**9, 10**9]
    if change == 'negative': layers[name]['shape'] = [-8, -9]
    if change == 'missing': del bits[name]
    if change == 'extra': bits['x'] = torch.zeros(3, dtype=torch.uint8)
    meta = dict(format=P.MASK_FILE.name, version='1', layers=json.dumps(layers), info='{}')
    if change == 'layers': meta['layers'] = '[1, 2]'
    if change == 'deep': meta['layers'] = '['*5000+']'*5000
    if change == 'info': meta['info'] = '{'
    save_tensors(bits, tmp_path/'m.safetensors',
                 dict(meta, sha256=P._digest(meta, bits) if change != 'dtype' else 'x'))
    with pytest.raises(OpenTransError): SparseMask.load(tmp_path/'m.safetensors')

def test_damaged_checkpoints_and_nothing_half_written(tmp_path):
    net = small()
    mask = SparseMask.magnitude(net, .2)
    (tmp_path/'no.pth').write_bytes(b'nothing')
    torch.save(dict(a=torch.ones(2)), tmp_path/'cut.pth')
    (tmp_path/'cut.pth').write_bytes((tmp_path/'cut.pth').read_bytes()[:300])
    for f in ('no.pth', 'cut.pth', 'none.pth', 'none.safetensors'):
        with pytest.raises(OpenTransError): transfer_checkpoint(mask, tmp_path/f, tmp_path/'out.pth')
    mask.bake(net, tmp_path/'b.safetensors')
    whole = (tmp_path/'b.safetensors').read_bytes()
    (tmp_path/'b.safetensors').write_bytes(whole[:-5])
    with pytest.raises(OpenTransError): load_baked(tmp_path/'b.safetensors')
    with pytest.raises(OpenTransError):
        # a file where a folder should be
        imp(small(), lambda m: None, density=.5, p=.5, checkpoint_dir=tmp_path/'no.pth')
    assert sorted(os.listdir(tmp_path)) == ['b.safetensors', 'cut.pth', 'no.pth']

# --- training

def test_fifty_adamw_steps_leave_exact_zeros_in_a_clip_resnet():
    net = tiny_resnet()
    mask,names = SparseMask.magnitude(net, .1),list(net.state_dict())
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=.1)
    dense = {n: w.clone() for n,w in mask.weights(net).items()}
    with mask.apply(nn.ModuleDict(dict(clip=nn.ModuleDict(dict(visual=net))))):
        for _ in range(50):
            opt.zero_grad()
            net.layer1(net.stem(torch.randn(2, 3, 16, 16))).square().mean().backward()
            opt.step()
    assert zeros(mask, net) and list(net.state_dict()) == names
    # the others have learned
    assert all((w != dense[n])[mask[n]].any()
               for n,w in mask.weights(net).items() if n.startswith(('conv', 'layer1')) and mask[n].any())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_imp_in_other_precisions(dtype):
    def train(model, r):
        opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
        for _ in range(2):
            x = torch.randn(4, 3, 8, 8, dtype=dtype)
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
        return loss
    net = small().to(dtype)
    mask,h = imp(net, train, density=.3, p=.3)
    assert zeros(mask, net) and mask.density == pytest.approx(.3, abs=2e-3) and h.loss.notna().all()

def test_imp_under_autocast_equals_the_zero_pattern():
    def train(model, r):
        opt = torch.optim.AdamW(model.parameters(), lr=.01)
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16):
                loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
    net = small()
    mask,_ = imp(net, train, density=.3, p=.3)
    assert zeros(mask, net) and net[1][0].weight.dtype == torch.float32

def test_two_four_masks_stay_two_four_in_training():
    net = small(8)
    mask = SparseMask.magnitude(net, .5, scope='2:4')
    opt = torch.optim.AdamW(net.parameters(), lr=.1, weight_decay=.1)
    with mask.apply(net):
        for _ in range(3):
            opt.zero_grad()
            net(torch.randn(4, 3, 8, 8)).square().mean().backward()
            opt.step()
    assert (((net[1][0].weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
            and ((net[4].weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())

# --- processes

ENV = dict(os.environ, OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0', ACCELERATE_USE_CPU='true')

def test_kill_nine_at_any_moment_and_resume(tmp_path):
    """Processes are killed at random times, and once in the middle of writing; mask, weights, norms' statistics and
    history end as without a kill."""
    run = python(Path(__file__).with_name('killed_imp.py'), tmp_path, env=ENV, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count('killed') == 2

def test_two_processes_find_the_same_mask(tmp_path):
    """accelerate with two ranks: the same mask and weights on both, also when a rank's weights drift, also after a
    resume."""
    pytest.importorskip('accelerate')
    for process in two_processes(Path(__file__).with_name('two_imp.py'), tmp_path, env=ENV, cwd=tmp_path):
        assert process.returncode == 0, process.stderr[-3000:]
    for name in ('trained', 'drifted'):
        first, second = (SparseMask.load(tmp_path/f'{name}{rank}.safetensors') for rank in (0, 1))
        assert first == second, name
    first, second = (torch.load(tmp_path/f'weights{rank}.pth', weights_only=True) for rank in (0, 1))
    mask = SparseMask.load(tmp_path/'trained0.safetensors')
    for name in mask.names:
        assert torch.equal(first[name], second[name]) and (first[name][~mask[name]] == 0).all(), name

# --- other runtimes

def test_onnx_gives_equal_output(tmp_path):
    for p in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(p)
    net = small(8)
    mask = SparseMask.magnitude(net, .1)
    mask.bake(net)
    assert export_onnx(net, tmp_path/'net.onnx', torch.randn(2, 3, 16, 16)) < 1e-5
    import onnx
    from onnx import numpy_helper
    ws = [numpy_helper.to_array(t) for t in onnx.load(str(tmp_path/'net.onnx')).graph.initializer]
    assert any(w.ndim == 4 and (w == 0).mean() > .5 for w in ws)               # the zeros are in the file

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_what_onnxruntime_cannot_run_is_told(tmp_path, dtype):
    for p in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(p)
    net, x = small().to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype)
    with pytest.raises(OpenTransError, match='onnxruntime cannot run it'): export_onnx(net, tmp_path/'net.onnx', x)
    with pytest.raises(OpenTransError, match='channels') as told: export_onnx(net, tmp_path/'o.onnx', x[:, :2])
    assert '\x1b' not in str(told.value)

def test_one_pattern_is_one_pattern():
    "A text is not read letter by letter, where a star would mean every layer."
    net = small()
    names = [layer.name for layer in prunable(net)]
    assert [layer.name for layer in prunable(net, only=names[-1])] == names[-1:]
    assert SparseMask.magnitude(net, .5, only=f'{names[-1][:2]}*').names == names[-1:]

def test_a_criterion_of_ones_own_covers_what_is_asked_for():
    net = small()
    names = [layer.name for layer in prunable(net)]
    def score(model): return {layer.name: layer.weight.detach().abs() for layer in layers(model)}
    assert SparseMask.by(score, net, .5, only=names[-1]).names == names[-1:]
    with pytest.raises(OpenTransError, match='no scores'): SparseMask.by(lambda model: {}, net, .5)
    with pytest.raises(OpenTransError, match='shape'):
        SparseMask.by(lambda model: dict.fromkeys(names, torch.ones(3)), net, .5)
    with pytest.raises(OpenTransError, match='Unknown scope'):
        SparseMask.magnitude(net, dict.fromkeys(names, .5), scope='row')

@pytest.mark.parametrize('losses', [lambda net: [], lambda net: None, lambda net: [1.], lambda net: [torch.ones(())],
                                    lambda net: [net(torch.ones(2, 3, 8, 8))], [torch.ones(2, 3, 8, 8)], None])
@pytest.mark.parametrize('criterion', ['snip', 'sensitivity'])
def test_losses_that_are_none(criterion, losses):
    with pytest.raises(OpenTransError, match='yields one scalar loss a batch'):
        SparseMask.by(criterion, small(), .5, losses)

def test_a_number_too_large_for_the_file(tmp_path):
    net = small().double()
    name = SparseMask.ones(net).names[-1]
    with torch.no_grad(): net.get_parameter(name).view(-1)[0] = 1e39
    with pytest.raises(OpenTransError, match='finite'): SparseMask.ones(net).bake(net, tmp_path/'net', torch.float32)
    assert SparseMask.ones(net).bake(net, tmp_path/'net', torch.float64)['ratio'] > 1

@pytest.mark.parametrize('rounds', [0, 2.5, '3'])
def test_rounds_of_a_cubic_schedule(rounds):
    with pytest.raises(OpenTransError, match='rounds'): cubic_schedule(.1, rounds)
