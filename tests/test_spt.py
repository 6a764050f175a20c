"""Sensitivity on towers of other libraries against the loop over samples; properties of allocations; masks, CLIP,
frameworks and Hugging Face's peft together."""
import copy, json, math
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from mutations import check_reader, digest
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from opentrans.errors import OpenTransError
from opentrans.heavy_tail import analyze
from opentrans.vit.peft_files import from_huggingface, load_added, save_added, to_huggingface
from opentrans.vit.peft import merge_peft, slots
from opentrans.pruning import SparseMask
from opentrans.vit.sensitivity import candidates, param_sensitivity, Sensitivity
from opentrans.vit.spt import (
    add_spt, allocate, alpha_sensitivity, apply_spt, merge_spt, plot_alpha_sensitivity, plot_profile, select,
    sensitivity_profile, spt_published, structured_cost, sweep_allocations, two_stage)

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.usefixtures('one_thread')

def loop(model, batch, loss, names):
    "Algorithm 1, a backward pass for each sample."
    model = copy.deepcopy(model).eval()
    there = slots(model)
    sums = {n: torch.zeros_like(there[n].tensor) for n in names}
    for i in range(len(batch[0])):
        model.zero_grad()
        loss(model(batch[0][i:i+1]), batch[1][i:i+1]).backward()
        for n in names:
            g = there[n].param.grad
            if g is not None: sums[n] += (g if there[n].rows is None else g[slice(*there[n].rows)]).square()
    return {n: t.detach() for n,t in sums.items()}

def clip_vit():
    from open_clip.transformer import VisionTransformer
    return VisionTransformer(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2., output_dim=5,
                             ls_init_value=.5)
def clip_rn():
    from open_clip.modified_resnet import ModifiedResNet
    m = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=5, heads=2, image_size=32, width=8)
    for n,p in m.named_parameters():
        if n.endswith('bn3.weight'): nn.init.ones_(p)
    return m
def swin():
    import timm
    return timm.models.SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2),
                                       num_heads=(2, 2), num_classes=5)
def convnext():
    import timm
    return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=5, ls_init_value=.5)
def resnet():
    import torchvision
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, groups=1,
                                     width_per_group=64)

@pytest.mark.parametrize('make', [clip_vit, clip_rn, swin, convnext, resnet])
def test_sensitivity_is_that_of_the_loop(make):
    """Every parameter of towers of open_clip, timm and torchvision: q, k and v in one, windows, depthwise
    convolutions, layer scales, attention pools, tables of positions."""
    torch.manual_seed(0)
    model = make().eval().double()
    x,y = torch.randn(3, 3, 32, 32).double(),torch.randint(5, (3,))
    names = list(slots(model)) if make is not resnet else [n for n in slots(model) if not n.startswith('layer4')]
    want = loop(model, (x, y), F.cross_entropy, names)
    got = param_sensitivity(model, [(x, y)], F.cross_entropy, names=names)
    for n in names: torch.testing.assert_close(got[n], want[n], rtol=1e-8, atol=1e-16, msg=lambda m: f'{n}: {m}')
    assert set(candidates(model)) < set(slots(model))

def test_memory_does_not_grow_with_the_samples():
    """All that is kept is a sum: of 4 and of 32 samples, handed over in one batch, the most that is alive is about
    the same."""
    from opentrans.cost import peak_memory
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
                          nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(16, 5)).eval()
    def peak(n):
        x,y = torch.randn(n, 3, 32, 32),torch.randint(5, (n,))
        return peak_memory(lambda: param_sensitivity(model, [(x, y)], F.cross_entropy, chunk=4))
    assert peak(32) < 1.3*peak(4)

# --- allocations

@st.composite
def sensitivities(draw):
    "Some matrices, kernels and vectors, with many ties."
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = draw(st.lists(st.sampled_from([(3, 5), (6, 4), (2, 3, 3, 3), (7,), (4,)]), min_size=1, max_size=6))
    levels = draw(st.integers(1, 30))
    return {f'b.{i}.m.{"weight" if len(s) > 1 else "bias"}': torch.randint(levels, s, generator=g).float()
            for i,s in enumerate(shapes)}
def size(s): return sum(t.numel() for t in s.values())
def flat(s, masks):
    return torch.cat([(masks[n] if n in masks else torch.zeros(t.shape, dtype=torch.bool)).flatten()
                      for n,t in s.items()])

@quick
@given(sensitivities(), st.data())
def test_top_tau(s, data):
    "Exactly tau entries; none outside is larger; ties go to the lowest flat index; nested in tau."
    tau = data.draw(st.integers(1, size(s)))
    m,values = flat(s, allocate(s, tau=tau, kind='none').masks),torch.cat([t.flatten() for t in s.values()])
    assert int(m.sum()) == tau
    order = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    assert set(m.nonzero().flatten().tolist()) == set(order[:tau])
    if tau > 1: assert not (flat(s, allocate(s, tau=tau-1, kind='none').masks) & ~m).any()

@quick
@given(sensitivities(), st.data(), st.sampled_from(['lora', 'adapter', 'none']), st.integers(1, 3),
       st.sampled_from([.5, 1., 4.]), st.sampled_from([None, 1., 2., 5.]))
def test_classes(s, data, kind, r, alpha, beta):
    """Each tensor is in one class, by its count and its threshold; the total is what the classes cost; at alpha=1
    and without whole vectors never above tau; a larger tau turns no matrix back."""
    tau = data.draw(st.integers(1, size(s)))
    al = allocate(s, None, kind, r, alpha, beta, tau=tau)
    t = al.table()
    assert sum(al.counts.values()) == tau and t.trained.sum() == al.n_trainable
    for n,row in t.iterrows():
        c,sh = al.counts[n],al.shapes[n]
        if kind != 'none' and len(sh) > 1 and c >= structured_cost(sh, kind, r)/alpha: want = 'structured'
        elif beta and len(sh) == 1 and c >= sh[0]/beta: want = 'vector'
        else: want = 'unstructured' if c else 'untouched'
        assert row['class'] == want
    if alpha <= 1 and beta in (None, 1.): assert al.n_trainable <= tau
    assert al.structured <= allocate(s, None, kind, r, alpha, beta,
                                     tau=min(size(s), tau+data.draw(st.integers(0, 20)))).structured

@quick
@given(sensitivities(), st.lists(st.integers(1, 100), min_size=1, max_size=4), st.sampled_from(['lora', 'adapter']))
def test_sweep_is_the_nearest(s, budgets, kind):
    "No tau that was tried comes nearer to a budget."
    taus = range(1, size(s)+1)
    swept = sweep_allocations(s, budgets, kind, 1, 10., 5., taus=taus)
    totals = [allocate(s, None, kind, 1, 10., 5., tau=t).n_trainable for t in taus]
    for b in budgets: assert abs(swept[b].n_trainable-b) == min(abs(t-b) for t in totals)

@quick
@given(sensitivities(), st.data(), st.sampled_from(['layer', 'channel', 'element']))
def test_levels_with_a_mask(s, data, level):
    "The same number at each level, and never a pruned weight."
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    masks = {n: torch.rand(t.shape, generator=g) < .6 for n,t in s.items()}
    alive = sum(int(m.sum()) for m in masks.values())
    if not alive: return
    count = data.draw(st.integers(1, alive))
    al = select(s, count, level, masks)
    assert al.n_trainable == sum(int(m.sum()) for m in al.masks.values()) == count
    assert not any((m & ~masks[n]).any() for n,m in al.masks.items())
    # one layer at most is cut
    if level == 'layer': assert sum(0 < int(m.sum()) < int(masks[n].sum()) for n,m in al.masks.items()) <= 1
    best = select(s, count, 'element', masks)
    # finer is never worse by its own score
    assert sum(float(s[n][m].sum()) for n,m in best.masks.items()) >= sum(
        float(s[n][m].sum()) for n,m in al.masks.items()) - 1e-3

# --- with the rest of the package

class ZeroShot(nn.Module):
    "CLIP as a classifier of names; its tower is where the names of tensors are read."
    def __init__(self, clip, names):
        super().__init__()
        self.clip = clip
        self.register_buffer('text', clip.encode_text(names))
    tower = property(lambda self: self.clip.tower)
    def forward(self, x): return self.clip.logit_scale*self.clip.encode_image(x)@self.text.T

@pytest.fixture(scope='module')
def zero_shot():
    from opentrans.clip import ClipBackbone
    torch.manual_seed(0)
    return ZeroShot(ClipBackbone.create('shapes-rn', pretrained='shapes-rn'),
                    ['red star', 'blue circle', 'green square']),torch.rand(6, 3, 64, 64),torch.arange(6) % 3

def test_on_the_clip_tower(zero_shot):
    """Names are the tower's; alpha picks layers, sensitivity the weights inside; the update is saved, loaded,
    merged; a mask keeps its zeros."""
    model,x,y = zero_shot
    model = copy.deepcopy(model)
    s = param_sensitivity(model, [(x, y)], F.cross_entropy)
    assert (set(s) == set(candidates(model.clip.tower)) and 'layer1.0.conv1.weight' in s
            and not any(n.startswith(('attnpool', 'conv1')) for n in s))
    table = analyze(model.clip)
    frame = alpha_sensitivity(table, s)
    assert (len(frame) > 10 and -1 <= frame.attrs['rho'] <= 1 and -1 <= frame.attrs['partial'] <= 1
            and (frame.sensitivity > 0).all())
    al = two_stage(table, s, 5000)
    assert al.n_trainable == 5000 and set(al.masks) <= set(table.select(.5).train)
    mask = SparseMask.magnitude(model.clip, .3)
    tower = model.clip.tower
    with mask.apply(model):
        al = allocate(param_sensitivity(model, [(x, y)], F.cross_entropy), 20_000, r=2, alpha=4., masks=mask)
        assert al.structured and al.masks
        apply_spt(model, al, seed=0)
        assert sum(p.numel() for n,p in tower.named_parameters() if p.requires_grad) == al.n_trainable
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=.1)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    out = model(x)
    merge_spt(model)
    # logits of a scale near 100
    torch.testing.assert_close(model(x), out, atol=1e-3, rtol=1e-4)
    assert all((w[~mask[n]] == 0).all() for n,w in mask.weights(model).items())
    for tau,by in ((5000, 'block'), (5000, 'operation')):
        assert sensitivity_profile(s, tau, by)['share'].sum() == pytest.approx(1)

def test_on_a_framework():
    "Scenes with labels to ignore: one loss a scene, from a framework's logits."
    from opentrans.data import ShapesWorld, collate
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    data = ShapesWorld('train', n=4, size=32)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=data.vocabulary, preset='small').eval()
    text = seg.text()
    def losses(m, b):
        return torch.stack([F.cross_entropy(layer[None], t[None], ignore_index=b['ignore'])
                            for layer,t in zip(m(b['images'], text), b['labels'])])
    batch = collate([data[i] for i in range(4)])
    s = param_sensitivity(seg, [batch], losses, chunk=2)
    one = [param_sensitivity(seg, [collate([data[i]])], losses) for i in range(4)]
    for n in s:
        torch.testing.assert_close(s[n], sum(o[n] for o in one), rtol=1e-3, atol=1e-6*float(s[n].max())+1e-12)
    alloc = allocate(s, 2000, r=1)
    with add_spt(seg, alloc):
        assert sum(p.numel() for p in seg.backbone.tower.parameters() if p.requires_grad) == alloc.n_trainable

def test_the_allocation_travels(tmp_path):
    "Saved in the package's own format whole; for Hugging Face what can be said, read by that library, too."
    import timm
    def vit():
        torch.manual_seed(0)
        return timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3,
                                             num_classes=5).eval()
    x,y = torch.randn(8, 3, 16, 16),torch.randint(5, (8,))
    s = param_sensitivity(vit(), [(x, y)], F.cross_entropy)
    model = apply_spt(vit(), allocate(s, 1500, r=1, alpha=2.), seed=0)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    save_added(model, tmp_path/'spt.safetensors')
    other = vit()
    load_added(other, tmp_path/'spt.safetensors')
    assert torch.equal(other(x), model(x))
    with pytest.raises(OpenTransError, match='no word for'): to_huggingface(model, tmp_path)
    structured = apply_spt(vit(), allocate(s, 1500, r=1, alpha=2., scattered=False), seed=0, full=('head',))
    for p in structured.parameters():
        if p.requires_grad: p.data.add_(torch.randn(p.shape)*.2)
    assert to_huggingface(structured, tmp_path/'hf') == []
    back = vit()
    from_huggingface(back, tmp_path/'hf')
    torch.testing.assert_close(back(x), structured(x), atol=1e-5, rtol=1e-5)
    hf = pytest.importorskip('peft')
    theirs = hf.PeftModel.from_pretrained(vit(), str(tmp_path/'hf')).eval()
    torch.testing.assert_close(theirs(x), structured(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merge_peft(structured)(x), theirs(x), atol=1e-5, rtol=1e-5)

def test_published_preset():
    p = spt_published()
    s = ({f'blocks.{i}.fc1.weight': torch.rand(40, 50, generator=torch.Generator().manual_seed(i))
          for i in range(3)} | {'blocks.0.norm.bias': torch.rand(50)})
    al = sweep_allocations(s, [800], **p['allocation'])[800]
    assert (p['allocation']['alpha'] == 10 and len(p['budgets']) == 7
            and abs(al.n_trainable-800) <= structured_cost((40, 50))
            and math.isclose(al.table().trained.sum(), al.n_trainable))

# --- models, batches and files that are not as they should be

class Upsampler(nn.Module):
    "Transposed convolutions, one of them in groups, and the `Conv1D` of GPT-2, whose weight is (in, out)."
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.groups = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.map, self.last = Conv1D(10, 6), nn.Linear(10, 5)
    def forward(self, x):
        return self.last(torch.relu(self.map(self.groups(torch.relu(self.up(self.stem(x)))).mean((2, 3)))))

@torch.no_grad()
def outputs_that_change(layer, x, mask):
    "Which output channels change when the chosen weights do."
    before = layer(x)
    layer.weight[mask] += 1
    dim = 1 if x.dim() == 4 else -1
    return ((layer(x)-before).abs() > 1e-6).movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()

@pytest.mark.parametrize('name', ['up', 'groups', 'map', 'stem'])
def test_a_channel_is_an_output_whatever_the_layout_of_the_weight(name):
    "All that goes into one output is chosen together: the only output that moves when the chosen weights move."
    model = Upsampler().eval()
    x, y = torch.randn(6, 3, 6, 6), torch.arange(6) % 5
    sens = param_sensitivity(model, [(x, y)], F.cross_entropy, names=[f'{name}.weight'])
    layer, t = getattr(model, name), sens[f'{name}.weight']
    outputs = getattr(layer, 'out_channels', getattr(layer, 'nf', None))
    per_output = t.numel()//outputs
    chosen = select(sens, per_output, 'channel').masks[f'{name}.weight']
    assert int(chosen.sum()) == per_output
    inputs = (torch.rand(2, getattr(layer, 'in_channels', t.shape[0]), 5, 5) if t.ndim == 4
              else torch.rand(2, len(t)))
    assert len(outputs_that_change(copy.deepcopy(layer), inputs, chosen)) == 1
    best = max(range(outputs), key=lambda k: float(t[one_output(layer, t, k)].sum()))
    assert torch.equal(chosen, one_output(layer, t, best))

def one_output(layer, t, k):
    "The entries of a weight that go into output k, by what torch's documentation says of its layout."
    mask = torch.zeros(t.shape, dtype=torch.bool)
    if isinstance(layer, nn.ConvTranspose2d):
        ins, outs = layer.in_channels//layer.groups, layer.out_channels//layer.groups
        mask[(k//outs)*ins:(k//outs+1)*ins, k % outs] = True
    elif t.ndim == 2: mask[:, k] = True
    else: mask[k] = True
    return mask

def test_only_what_can_take_a_module_gets_one():
    """An embedding is no matrix to update, and no adapter stands behind a transposed convolution: both are tuned
    weight by weight."""
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 8)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.head = nn.Linear(8, 3)
        def forward(self, x): return self.head(self.body(self.words(x)).mean(1))
    torch.manual_seed(0)
    words, data = Words(), [(torch.randint(9, (6, 4)), torch.arange(6) % 3)]
    for kind in ('lora', 'adapter'):
        alloc = allocate(param_sensitivity(words, data, F.cross_entropy, names=['words.weight', 'body.0.weight']),
                         100, kind, r=1)
        assert alloc.structured == {'body.0.weight'} and 'words.weight' in alloc.masks
        apply_spt(copy.deepcopy(words), alloc)
    model, x = Upsampler().eval(), torch.randn(6, 3, 6, 6)
    alloc = allocate(param_sensitivity(model, [(x, torch.arange(6) % 5)], F.cross_entropy), 200, 'adapter', r=1)
    assert not {'up.weight', 'groups.weight', 'map.weight'} & alloc.structured
    apply_spt(model, alloc)

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('wrap',
                         [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm,
                          lambda m: prune.l1_unstructured(m, 'weight', .5)])
def test_a_parametrised_layer_has_the_sensitivities_of_its_parameters(wrap):
    "They are those of the loop, and what is allocated to them is trained."
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)).eval()
    data = torch.randn(5, 6), torch.arange(5) % 3
    sens = param_sensitivity(make(), [data], F.cross_entropy)
    model, there = make(), slots(make())
    assert any('weight' in n and n.startswith('2.') for n in sens)
    want = {n: torch.zeros(there[n].shape) for n in sens}
    for i in range(5):
        model.zero_grad()
        F.cross_entropy(model(data[0][i:i+1]), data[1][i:i+1]).backward()
        for n in sens: want[n] += slots(model)[n].param.grad.square()
    for n in sens: torch.testing.assert_close(sens[n], want[n], rtol=1e-4, atol=1e-9)
    tuned = make()
    before = tuned(data[0])
    alloc = allocate(sens, 40, r=1)
    assert not any(n.startswith('2.') for n in alloc.structured)
    with torch.no_grad():
        for part in add_spt(tuned, alloc).parts.values():
            for p in part.parameters(): p.add_(.3)
    assert (tuned(data[0])-before).abs().max() > 1e-3

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))

@pytest.mark.parametrize('per_sample', [True, False])
def test_a_batch_that_is_none_is_one_sentence(per_sample):
    "Each is refused before anything is trained or counted, and the model is as it was."
    x = torch.rand(4, 3, 8, 8)
    y = torch.tensor([0, 1, 2, 0])
    model = small()
    before = digest(model)
    nan = small()
    nan[1].weight.data[0, 0] = float('nan')
    cases = [([], 'no samples'), (None, 'must give batches'), ([x], 'must be'),
             ([((x*255).byte(), y)], 'torch.uint8'), ([(x, y+1)], 'Labels must be 0 to'),
             ([(x, y[:3])], '4 inputs and 3 targets')]
    for loader, why in cases:
        with pytest.raises(OpenTransError, match=why):
            param_sensitivity(model, loader, F.cross_entropy, per_sample=per_sample)
    with pytest.raises(OpenTransError, match='is NaN or infinite'):
        param_sensitivity(nan, [(x, y)], F.cross_entropy, per_sample=per_sample)
    with pytest.raises(OpenTransError, match='must return one number'):
        param_sensitivity(model, [(x, y)], lambda o, t: o, per_sample=per_sample)
    for kw, why in ((dict(n_samples=0), 'n_samples=0'), (dict(n_samples=1.5), 'n_samples=1.5'),
                    (dict(chunk=-1), 'chunk=-1')):
        with pytest.raises(OpenTransError, match=why):
            param_sensitivity(model, [(x, y)], F.cross_entropy, per_sample=per_sample, **kw)
    assert digest(model) == before

def test_a_model_without_numbers_to_differentiate_is_one_sentence():
    """Lazy, on the meta device, or with codes of a quantized layer; by default such a layer is left out with a
    warning."""
    data = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))
    with pytest.raises(OpenTransError, match='the layers are lazy'): param_sensitivity(lazy, data, F.cross_entropy)
    with pytest.raises(OpenTransError, match='have no values'):
        param_sensitivity(small().to('meta'), data, F.cross_entropy)
    codes = small()
    codes[1].weight = nn.Parameter((codes[1].weight*50).to(torch.int8), requires_grad=False)
    with pytest.raises(OpenTransError, match="'1.weight' holds whole numbers"):
        param_sensitivity(codes, data, F.cross_entropy, names=['1.weight'])
    with pytest.warns(UserWarning, match='1.weight'): assert '1.weight' not in candidates(codes)

@pytest.mark.parametrize('per_sample', [True, False])
def test_inference_mode_changes_nothing(per_sample):
    x = torch.rand(4, 3, 8, 8)
    y = torch.tensor([0, 1, 2, 0])
    model = small().eval()
    want = param_sensitivity(model, [(x, y)], F.cross_entropy, per_sample=per_sample)
    with torch.inference_mode():
        got = param_sensitivity(model, [(x.clone(), y)], F.cross_entropy, per_sample=per_sample)
    assert digest(want) == digest(got)

def sensitivities_of_small():
    torch.manual_seed(0)
    return param_sensitivity(Upsampler(), [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 0]))], F.cross_entropy)

def test_damaged_and_forged_sensitivities_are_refused(tmp_path):
    "What is read can be used for an allocation, and what is only damaged is never read as something else."
    path = tmp_path/'s.safetensors'
    sensitivities_of_small().save(path)
    def read(target, file):
        sens = Sensitivity.load(file)
        select(sens, 20, 'channel')
        allocate(sens, 50, r=1)
        return sens
    check_reader(path, read, same=lambda s: digest(dict(s), s.samples, s.always, s.info, s.takes, s.outputs))

def test_sensitivities_of_opentrans_0_1_still_load(tmp_path):
    "They know nothing of layouts, and have neither version nor checksum."
    sens, path = sensitivities_of_small(), tmp_path/'s.safetensors'
    info = dict(format='opentrans-sensitivity', samples=json.dumps(sens.samples), always=json.dumps(sens.always),
                info=json.dumps(sens.info))
    save_file({n: t.contiguous() for n, t in sens.items()}, path, metadata=info)
    old = Sensitivity.load(path)
    assert digest(dict(sorted(old.items())), old.samples, old.info) == digest(
        dict(sorted(sens.items())), sens.samples, sens.info)

def test_an_allocation_from_a_file_is_that_of_the_run(tmp_path):
    "Of equal sensitivities the first are taken, so that the order of the tensors is a part of what is saved."
    sens = Sensitivity({'z.weight': torch.ones(3, 4), 'a.weight': torch.ones(3, 4), 'm.bias': torch.ones(3)})
    sens.save(tmp_path/'s.safetensors')
    old = Sensitivity.load(tmp_path/'s.safetensors')
    assert list(old) == list(sens)
    assert digest(allocate(old, 14, 'none').masks) == digest(allocate(sens, 14, 'none').masks)

def test_sensitivities_that_are_no_numbers_are_not_saved(tmp_path):
    path = tmp_path/'s.safetensors'
    with pytest.raises(OpenTransError, match='not finite.*nothing is saved'):
        Sensitivity(a=torch.tensor([1., math.inf])).save(path)
    assert not path.exists()

def test_numbers_of_an_allocation_have_ranges():
    "One sentence for each, wherever it is given."
    sens = {'a.weight': torch.rand(4, 5), 'a.bias': torch.rand(4)}
    for kw, why in ((dict(budget=0), 'budget=0'), (dict(budget=2.5), 'budget=2.5'),
                    (dict(budget=math.nan), 'budget=nan'), (dict(r=0), 'r=0'), (dict(r=True), 'r=True'),
                    (dict(alpha=0), 'alpha=0'), (dict(alpha=math.nan), 'alpha=nan'), (dict(beta=-1), 'beta=-1'),
                    (dict(masks={'x.weight': torch.ones(4)}), 'another model'),
                    (dict(masks={'a.weight': torch.ones(3, 5)}), 'has 15 entries, the tensor 20')):
        with pytest.raises(OpenTransError, match=why): allocate(sens, **{**dict(budget=4, r=1), **kw})
    for budgets, taus in (([0], None), ([3], [0]), ([3], [1.5])):
        with pytest.raises(OpenTransError, match='it must be a whole number from 1 on'):
            sweep_allocations(sens, budgets, r=1, taus=taus)
    with pytest.raises(OpenTransError, match='negative'): allocate({'a.weight': -torch.rand(4, 5)}, 4, r=1)
    for level in ('layer', 'channel', 'element'):
        with pytest.raises(OpenTransError, match='count=0|budget=0'): select(sens, 0, level)
    with pytest.raises(OpenTransError, match='from 0 up to, but not including, 1'):
        add_spt(nn.Sequential(nn.Linear(5, 4)), allocate({'0.weight': torch.rand(4, 5)}, 20, r=1), dropout=1)

def test_what_is_tuned_learns_again_as_before_after_the_base_was_loaded_anew():
    "`load_state_dict(assign=True)` puts other parameters in the same places."
    sens, model = sensitivities_of_small(), Upsampler()
    model.last.bias.requires_grad_(False)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    handle = add_spt(model, allocate(sens, 60, r=1))
    model.load_state_dict(Upsampler().state_dict(), strict=False, assign=True)
    handle.remove()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learns

def test_names_in_plots_are_names():
    "A block or a task may be called like a formula."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    sens = {f'$x_{{$blocks.{i}.mlp.fc1.weight': torch.rand(3, 4) for i in range(3)}
    for by in ('block', 'operation'):
        plot_profile({'$y_{$': sensitivity_profile(sens, 9, by), '_z': sensitivity_profile(sens, 9, by)},
                     column='share').figure.canvas.draw()
    frame = pd.DataFrame(dict(alpha=[2., 3., 4.], sensitivity=[1., 2., 3.]), index=list(sens))
    frame.attrs.update(rho=.5, p=.1, partial=.2)
    plot_alpha_sensitivity(frame).figure.canvas.draw()
    plt.close('all')
