"Parts on models of other libraries, and Hugging Face's peft as a reader and a writer of the same files."
import copy, json, socket
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from mutations import check_reader, digest
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from opentrans.core import layers, LayerSelection
from opentrans.errors import OpenTransError
from opentrans.files import load_tensors
from opentrans.vit.peft import (add_adapters, add_lora, add_sparse, merge_peft, Part, slots, trainable_report,
                                Tunable)
from opentrans.vit.peft_files import from_huggingface, load_added, save_added, to_huggingface
from opentrans.pruning import SparseMask

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.usefixtures('one_thread')

def stir(model, seed=0, scale=.3):
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, Part):
            for p in m.parameters(recurse=False): p.data.copy_(torch.randn(p.shape, generator=g)*scale)
    return model

def timm_vit():
    import timm
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3,
                                         num_classes=5).eval(),torch.randn(2, 3, 16, 16)
def clip_vit():
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch_size=8, width=24, layers=2, heads=3, mlp_ratio=2.,
                             output_dim=12).eval(),torch.randn(2, 3, 16, 16)
def clip_rn():
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    m = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8).eval()
    for n,p in m.named_parameters():
        if n.endswith('bn3.weight'): nn.init.ones_(p)
    return m,torch.randn(2, 3, 64, 64)
def convnext():
    import timm
    torch.manual_seed(0)
    return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=5,
                                ls_init_value=.5).eval(),torch.randn(2, 3, 64, 64)
def torch_encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.TransformerEncoderLayer(24, 3, 40, dropout=0., batch_first=True),
                         nn.Linear(24, 4)).eval(),torch.randn(2, 5, 6)
MODELS = dict(timm_vit=timm_vit, clip_vit=clip_vit, clip_rn=clip_rn, convnext=convnext, torch_encoder=torch_encoder)

def trainable(model): return sum(p.numel() for p in model.parameters() if p.requires_grad)

@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_everything_at_once(name):
    "A part on every tensor of a model: base outputs before, merged equals unmerged after, and all of it off again."
    model,x = MODELS[name]()
    keys = list(model.state_dict())
    # frozen as it will be: PyTorch chooses kernels by it
    y = model.requires_grad_(False)(x)
    there = slots(model)
    masks = {n: torch.rand(s.shape, generator=torch.Generator().manual_seed(i)) < .5
             for i,(n,s) in enumerate(there.items()) if not s.ismatrix}
    masks = {n: m for n,m in masks.items() if m.any()}
    handles = add_lora(model, r=2),add_sparse(model, masks)
    assert torch.equal(model(x), y)                                                     # bit for bit
    assert set(keys) <= set(model.state_dict())                                         # the names of the base stay
    assert trainable(model) == sum(map(len, handles[0].parts.values())) + sum(
        int(m.sum()) for m in masks.values()) == trainable_report(model)['count'].sum()
    stir(model, scale=.1)
    tuned = model(x)
    assert (tuned-y).abs().max() > 1e-3
    merged = merge_peft(copy.deepcopy(model))
    # float32, a part on every tensor: 1e-5 of the values that flow
    torch.testing.assert_close(merged(x), tuned, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merge_peft(copy.deepcopy(model).double())(x.double()),
                               copy.deepcopy(model).double()(x.double()), atol=1e-10, rtol=1e-10)
    assert not any(isinstance(m, Tunable) for m in merged.modules()) and list(merged.state_dict()) == keys
    for h in reversed(handles): h.remove()
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys

@pytest.mark.parametrize('name', MODELS)
def test_every_part_learns_and_the_base_rests(name):
    "Steps of AdamW with weight decay move every part, and no bit of the base."
    model,x = MODELS[name]()
    before = copy.deepcopy(dict(model.named_parameters()))
    there = slots(model)
    some = {n: s
            for i,(n,s) in enumerate(there.items())
            if s.ismatrix and isinstance(s.module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
            and not n.startswith('attnpool')}
    names = list(some)
    add_lora(model, names[0::3], r=2, dropout=0. if name == 'convnext' else .1, seed=0)
    add_adapters(model, names[1::3], r=2, seed=0)
    add_sparse(model, {n: torch.ones(some[n].shape).bool() for n in names[2::3]})
    first = {n: p.detach().clone() for n,p in model.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=.1)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(0))
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    for _ in range(3):
        opt.zero_grad()
        (model(x)-target).square().sum().backward()
        opt.step()
    now = dict(model.named_parameters())
    still = [n for n in first if torch.equal(first[n], now[n])]
    # a bias in front of zeros begins to move one step later
    assert not [n for n in still if not n.endswith('.v')], still
    assert all(torch.equal(now[n], p) for n,p in before.items())

@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 2),
       st.integers(0, 2), st.integers(1, 2), st.integers(0, 10**6))
def test_convolutions_merge(cin, groups, cout, k, stride, padding, dilation, seed):
    "LoRA of any Conv2d: beside the kernel or through it, merged or not, the same."
    torch.manual_seed(seed)
    conv = nn.Conv2d(cin*groups, cout*groups, k, stride, padding, dilation, groups,
                     padding_mode='circular' if padding == 1 else 'zeros')
    net,x = nn.Sequential(conv).double(),torch.randn(2, cin*groups, 9, 8).double()
    h = add_lora(net, r=2)
    stir(net)
    y = net(x)
    merge_peft(net)
    torch.testing.assert_close(net(x), y, atol=1e-10, rtol=1e-10)
    assert type(net[0]) is nn.Conv2d and h.parts['0.weight'] is not None

@quick
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6), st.floats(.05, .95))
def test_sparse_gradient_is_the_dense_one_gathered(n, m, seed, p):
    torch.manual_seed(seed)
    net,x = nn.Sequential(nn.Linear(m, n)).double(),torch.randn(3, m).double()
    mask = torch.rand(n, m) < p
    if not mask.any(): mask[0, 0] = True
    net(x).pow(2).sum().backward()
    dense = net[0].weight.grad[mask]
    net.zero_grad()
    part = add_sparse(net, {'0.weight': mask}).parts['0.weight']
    net(x).pow(2).sum().backward()
    torch.testing.assert_close(part.delta.grad, dense, atol=1e-10, rtol=1e-10)
    assert net[0]._parameters['weight'].grad is None

def test_masks_and_selections_still_find_their_layers():
    """Names stay: a mask keeps its zeros under LoRA, in force and after the merge; a layer selection finds its
    layers after the merge."""
    model,x = clip_rn()
    mask = SparseMask.magnitude(model, .3, scope='layer')
    with mask.apply(model):
        add_lora(model, mask.names, r=2, masks=mask)
        stir(model)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        assert {layer.name for layer in layers(model)} == {layer.name for layer in layers(clip_rn()[0])}
    merge_peft(model)
    for n,w in mask.weights(model).items(): assert (w[~mask[n]] == 0).all() and (w[mask[n]] != 0).any()
    with LayerSelection([mask.names[0]], mask.names[1:]).apply(model):
        assert slots(model)[mask.names[0]].param.requires_grad

def test_saved_parts_survive_a_cut_file(tmp_path):
    model,x = clip_vit()
    add_lora(model, r=2)
    stir(model)
    save_added(model, tmp_path/'a.safetensors')
    data = (tmp_path/'a.safetensors').read_bytes()
    (tmp_path/'b.safetensors').write_bytes(data[:len(data)//2])
    with pytest.raises(OpenTransError, match='not a whole safetensors file'):
        load_added(clip_vit()[0], tmp_path/'b.safetensors')
    other = clip_vit()[0]
    load_added(other, tmp_path/'a.safetensors')
    assert torch.equal(other(x), model(x))

# --- Hugging Face's peft

CASES = {
    'timm_vit': (['blocks.0.attn.qkv.weight[q]', 'blocks.0.attn.qkv.weight[v]', 'blocks.*.mlp.fc1.weight',
                  'blocks.1.attn.proj.weight'],
                 ['blocks.0.attn.qkv.bias[k]', 'blocks.1.norm1.weight', 'blocks.1.mlp.fc2.bias']),
    'clip_vit': (['transformer.resblocks.0.attn.in_proj_weight[q]', 'transformer.resblocks.*.mlp.c_fc.weight'],
                 ['transformer.resblocks.0.attn.in_proj_bias[v]', 'transformer.resblocks.1.ln_2.bias',
                  'transformer.resblocks.1.attn.out_proj.bias', 'transformer.resblocks.0.mlp.c_fc.bias']),
    'clip_rn': (['layer*.0.conv2.weight', 'conv1.weight'], ['layer1.0.bn1.bias'])}

@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_the_library_reads_what_we_write(name, tmp_path):
    hf = pytest.importorskip('peft')
    low,vectors = CASES[name]
    model,x = MODELS[name]()
    base = model(x)
    add_lora(model, low, r=2)
    add_sparse(model, {n: torch.arange(slots(model)[n].shape[0]) % 2 == 0 for n in vectors})
    stir(model)
    assert to_huggingface(model, tmp_path) == []
    theirs = hf.PeftModel.from_pretrained(MODELS[name]()[0], str(tmp_path)).eval()
    assert (model(x)-base).abs().max() > 1e-3
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(theirs.merge_and_unload()(x), merge_peft(copy.deepcopy(model))(x), atol=1e-5,
                               rtol=1e-4)

@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_we_read_what_the_library_writes(name, tmp_path):
    hf = pytest.importorskip('peft')
    base,x = MODELS[name]()
    targets = dict(timm_vit=['qkv', 'fc1'], clip_vit=['attn', 'c_fc'], clip_rn=['conv2'])[name]
    config = hf.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=name == 'timm_vit',
                           rank_pattern={'fc1': 2}, alpha_pattern={'fc1': 7}, bias='all',
                           modules_to_save=['head'] if name == 'timm_vit' else None)
    torch.manual_seed(1)
    theirs = hf.get_peft_model(base, config).eval()
    for n,p in theirs.named_parameters():
        # peft 0.21 adds that one twice (pull request 3774): left at 0
        if p.requires_grad and 'out_proj.lora_B' not in n:
            p.add_(torch.randn(p.shape)*.2)
    theirs.save_pretrained(tmp_path)
    ours = MODELS[name]()[0]
    plain = ours(x)
    from_huggingface(ours, tmp_path)
    assert (ours(x)-plain).abs().max() > 1e-3
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)

# --- files and models that are not as they should be

def tiny():
    "A model with everything a file of parts may hold: packed and plain matrices, a kernel, vectors."
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(12, 3, 20, dropout=0., batch_first=True)
    return nn.Sequential(nn.Linear(6, 12), encoder, nn.Linear(12, 4)).eval()

def tuned():
    "The same with parts of all three kinds, and a layer that is trained in full."
    model = tiny()
    add_lora(model, ['0.weight', '1.self_attn.in_proj_weight[v]'], r=2)
    add_lora(model, '1.linear1.weight', r=2, masks={'1.linear1.weight': torch.rand(20, 12) < .5})
    add_adapters(model, '1.linear2.weight', r=3)
    add_sparse(model,
               {'1.norm1.bias': torch.arange(12) < 5, '1.self_attn.in_proj_weight[k]': torch.rand(12, 12) < .3})
    model[2].requires_grad_(True)
    return stir(model)

def test_damaged_and_forged_parts_are_refused_whole(tmp_path):
    "A file that is refused leaves the model as it was; one that is only damaged is never read as something else."
    model, path = tuned(), tmp_path/'parts.safetensors'
    save_added(model, path)
    def read(target, file):
        load_added(target, file)
        return target
    check_reader(path, read, tiny, digest, digest)

def test_parts_of_opentrans_0_1_still_load(tmp_path):
    "They have no version and no checksum, and their table of parts is the same."
    model, path = tuned(), tmp_path/'parts.safetensors'
    save_added(model, path, task='toy')
    tensors, meta = load_tensors(path)
    meta.pop('version')
    save_file(tensors, path, metadata=meta)
    other = tiny()
    load_added(other, path)
    x = torch.randn(2, 5, 6)
    assert torch.equal(other(x), model(x))

def test_a_diverged_model_is_not_saved_over_a_good_one(tmp_path):
    model, path = tuned(), tmp_path/'parts.safetensors'
    save_added(model, path)
    before = path.read_bytes()
    model[0].tuned['weight'].A.data[0, 0] = float('nan')
    with pytest.raises(OpenTransError, match='1 of .* not finite.*nothing is saved'): save_added(model, path)
    assert path.read_bytes() == before

def test_damaged_and_forged_adapters_of_peft_are_refused_whole(tmp_path):
    """Both files of Hugging Face's format; it has no checksum, so damage inside the numbers is not seen, but
    nothing is applied in part."""
    model, folder = tiny(), tmp_path/'adapter'
    add_lora(model, ['0.weight', '1.self_attn.in_proj_weight[v]', '1.linear1.weight'], r=2)
    add_sparse(model, {'1.linear1.bias': torch.ones(20).bool()})
    to_huggingface(stir(model), folder)
    for name in ('adapter_config.json', 'adapter_model.safetensors'):
        good = (folder/name).read_bytes()
        def read(target, path):
            (folder/name).write_bytes(path.read_bytes())
            return from_huggingface(target, folder)
        copied = tmp_path/name
        copied.write_bytes(good)
        check_reader(copied, read, tiny, digest)
        (folder/name).write_bytes(good)

def test_what_an_adapter_of_peft_says_is_data(tmp_path, monkeypatch):
    "Its base model is not fetched, and a pattern that would take for ever is refused before it is tried."
    model = tiny()
    add_lora(model, '0.weight', r=2)
    to_huggingface(stir(model), tmp_path, base='somebody/some-model')
    monkeypatch.setattr(socket.socket, 'connect', lambda *a: pytest.fail('something asked for the network'))
    from_huggingface(tiny(), tmp_path)
    config = json.loads((tmp_path/'adapter_config.json').read_text())
    for pattern in ('(a+)+b', '(.*)*x', 'a?'*20, '(', '[', 'x'*2000):
        (tmp_path/'adapter_config.json').write_text(json.dumps(config | dict(alpha_pattern={pattern: 1.})))
        with pytest.raises(OpenTransError, match='which is not read here'): from_huggingface(tiny(), tmp_path)
    (tmp_path/'adapter_config.json').write_text(json.dumps(config | dict(alpha_pattern={r'.*\.0|0': 4.})))
    assert len(from_huggingface(tiny(), tmp_path).parts) == 1

def test_updates_stay_in_force_when_the_base_is_loaded_anew():
    """`load_state_dict(assign=True)` puts other parameters in the same places: updates stay, and after `remove`
    everything learns again."""
    for assign in (False, True):
        model, x = tiny(), torch.randn(2, 5, 6)
        parts = add_lora(model, ['0.weight', '1.linear1.weight'], r=2)
        stir(model)
        base = {n: t + 1 for n, t in tiny().state_dict().items()}
        model.load_state_dict(base, strict=False, assign=assign)
        hand = tiny()
        hand.load_state_dict(base)
        for name, part in parts.parts.items(): slots(hand)[name].tensor.data.add_(part.delta().detach())
        torch.testing.assert_close(model(x), hand(x), atol=1e-4, rtol=1e-4)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if 'tuned' in n}
        parts.remove()
        assert all(p.requires_grad for p in model.parameters())

PARAMETRISED = dict(weight_norm=parametrizations.weight_norm, old_weight_norm=nn.utils.weight_norm,
                    spectral_norm=parametrizations.spectral_norm, old_spectral_norm=nn.utils.spectral_norm,
                    orthogonal=parametrizations.orthogonal, prune=lambda m: prune.l1_unstructured(m, 'weight', .5))

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', PARAMETRISED)
def test_a_weight_that_is_computed_is_no_target(name):
    """It is refused by a sentence that names what it is computed from, left out with a warning, and what it is
    computed from can be tuned."""
    model = nn.Sequential(nn.Linear(8, 12), PARAMETRISED[name](nn.Linear(12, 12)), nn.Linear(12, 4)).eval()
    for add in (add_lora, add_adapters):
        with pytest.raises(OpenTransError,
                           match="'1.weight' is no parameter: a parametrisation .* computes it from .*weight"):
            add(model, '1.weight', r=2)
    with pytest.warns(UserWarning, match='1 layers are left out.*1.weight'): parts = add_lora(model, r=2)
    assert list(parts.parts) == ['0.weight', '2.weight']
    parts.remove()
    x = torch.randn(3, 8)
    before = model(x)
    places = [n for n, s in slots(model).items() if n.startswith('1.') and n != '1.bias']
    add_sparse(model, {n: torch.ones(slots(model)[n].shape).bool() for n in places})
    torch.testing.assert_close(model(x), before)
    stir(model)
    assert (model(x)-before).abs().max() > 1e-3

def test_a_parametrisation_that_is_put_on_later_is_an_error():
    "The update would count twice, or not at all."
    for add in (lambda m: add_lora(m, '0.weight', r=2), lambda m: add_adapters(m, '0.weight', r=2)):
        model = nn.Sequential(nn.Linear(4, 4))
        add(model)
        with pytest.raises(OpenTransError, match='is no parameter: a parametrisation'):
            parametrizations.weight_norm(model[0])
            model(torch.ones(1, 4))

@pytest.mark.parametrize('dtype', [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_no_target(dtype):
    "Codes cannot be trained: refused by name, left out with a warning."
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].weight = nn.Parameter(model[1].weight.to(dtype), requires_grad=False)
    for add in (add_lora, add_adapters):
        with pytest.raises(OpenTransError, match="'1.weight' (holds whole numbers|is of torch.float8)"):
            add(model, '1.weight', r=2)
    with pytest.raises(OpenTransError, match="'1.weight'"): add_sparse(model, {'1.weight': torch.ones(4, 4).bool()})
    with pytest.warns(UserWarning, match='1.weight'): assert list(add_lora(model, r=2).parts) == ['0.weight']

def test_a_lazy_model_is_called_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    for names in ('0.weight', '1.weight', None):
        with pytest.raises(OpenTransError, match='has no shape|have no shape'): add_lora(model, names, r=2)
    model(torch.ones(1, 4))
    assert len(add_lora(model, r=2).parts) == 2

@torch.no_grad()
def test_convolutions_with_a_forward_of_their_own_merge():
    """timm's convolutions that pad as TensorFlow, or standardise their weights: the update is one with the weight
    there, not beside it."""
    from timm.layers import Conv2dSame, Linear, StdConv2d
    for layer, x in ((Conv2dSame(3, 4, 3, stride=2), torch.randn(2, 3, 9, 9)),
                     (StdConv2d(3, 4, 3), torch.randn(2, 3, 9, 9)), (Linear(3, 4), torch.randn(2, 3))):
        net = nn.Sequential(layer).eval()
        parts, plain = add_lora(net, r=2), net(x)
        y = stir(net)(x)
        assert (y-plain).abs().max() > 1e-2
        assert parts.parts['0.weight'].light == isinstance(layer, nn.Linear)
        torch.testing.assert_close(merge_peft(net)(x), y, atol=1e-5, rtol=1e-5)
