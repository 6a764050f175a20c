"""Baked files on the sparse engine: small, mapped into memory, the outputs of the masked model, and never led astray
by a file that was damaged or forged."""
import copy, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from timm.layers import Conv2dSame
from torch import nn
from mutations import check_reader
from opentrans import sparse
from opentrans.errors import DamagedFile, FormatError, OpenTransError
from opentrans.files import BAKED_FILE, load_tensors, pack_bits, save_tensors
from opentrans.pruning import load_baked, SparseMask
from opentrans.sparse.regions import capture
from opentrans.sparse.stored import describe, run_on_torch, StoredWeight
from test_sparse import far, lively, own_cache, small_net # noqa: F401 (a fixture)

def resnet50():
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    net = ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64).eval()
    net.attnpool = nn.Identity()
    return net

@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_rows_of_a_stored_weight(outputs, inputs, side, density, seed):
    "Any row, for every number of bits that a row may have."
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, side, side, generator=g)
    keep = torch.rand(weight.shape, generator=g) < density
    stored = StoredWeight(weight.shape, weight[keep], pack_bits(keep))
    want = (weight*keep).numpy()
    assert all(np.array_equal(stored[i], want[i]) for i in range(outputs))
    assert np.array_equal(stored[np.arange(outputs)[::-1]], want[::-1])
    assert np.array_equal(stored.there(), keep.flatten(1).numpy()) and stored.size == weight.numel()

@pytest.mark.slow
def test_sizes_of_rn50(tmp_path):
    "A tenth of 23.5 million weights: below 15 MB in float32, below 9 in float16."
    net = resnet50()
    mask = SparseMask.magnitude(net, .1)
    for dtype, most in ((torch.float32, 15e6), (torch.float16, 9e6)):
        mask.bake(net, tmp_path/'net.safetensors', dtype)
        assert (tmp_path/'net.safetensors').stat().st_size < most

@pytest.mark.parametrize('pool', [True, False])
@pytest.mark.parametrize('llvm', [True, False])
@torch.no_grad()
def test_a_file_gives_what_the_model_gave(tmp_path, pool, llvm, monkeypatch):
    if not llvm: monkeypatch.setattr('opentrans.sparse.stored.has_llvm', lambda: False)
    net = small_net(pool)
    SparseMask.magnitude(net, .2).bake(net, tmp_path/'net.safetensors')
    fast, x = sparse.load(tmp_path/'net.safetensors', threads=2), torch.randn(2, 3, 48, 40)
    assert isinstance(fast, sparse.StoredEngine) and far(fast(x), net(x)) < 1e-5
    assert far(copy.deepcopy(fast)(x), net(x)) < 1e-5 and fast.error < 1e-5 and not fast.reasons
    assert bool(fast.plans) == (llvm and sparse.has_llvm())
    half = net.half().float()
    SparseMask.magnitude(net, .2).bake(net, tmp_path/'net.safetensors', torch.float16)
    assert far(sparse.load(tmp_path/'net.safetensors')(x), half(x)) < 1e-5

@torch.no_grad()
def test_the_steps_on_torch_are_the_model():
    net, x = small_net(True), torch.randn(1, 3, 33, 47)
    region, = capture(net).regions.values()
    assert far(run_on_torch(region, [x])[0], net(x)) < 1e-5

@pytest.mark.parametrize('llvm', [True, False])
@torch.no_grad()
def test_a_file_pads_by_the_size_of_the_image(tmp_path, llvm, monkeypatch):
    "As TensorFlow's models do: with other zeros around images of even and of odd sizes."
    if not llvm: monkeypatch.setattr('opentrans.sparse.stored.has_llvm', lambda: False)
    torch.manual_seed(0)
    layers = Conv2dSame(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), Conv2dSame(8, 8, 5, 2, groups=8)
    net = lively(nn.Sequential(*layers))
    SparseMask.magnitude(net, .5).bake(net, tmp_path/'net.safetensors')
    fast = sparse.load(tmp_path/'net.safetensors')
    for size in ((32, 32), (33, 30), (1, 2)):
        x = torch.randn(2, 3, *size)
        assert fast(x).shape == net(x).shape and far(fast(x), net(x)) < 1e-5
    assert len(fast.plans) == (3 if llvm and sparse.has_llvm() else 0) and not fast.reasons

@torch.no_grad()
def test_a_backbone_gives_its_maps(tmp_path):
    from opentrans.clip import ClipBackbone
    backbone = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    mask = SparseMask.magnitude(backbone, .1)
    mask.bake(backbone, tmp_path/'b.safetensors')
    images = torch.rand(2, 3, 64, 96)
    want, got = backbone(images), sparse.load(tmp_path/'b.safetensors')(images)
    assert [*want] == [*got] and all(far(got[k], want[k]) < 1e-5 for k in want)
    whole = sparse.load(tmp_path/'b.safetensors', ClipBackbone.create('shapes-rn', pretrained='shapes-rn'))
    assert far(whole.dense_embeddings(images), backbone.dense_embeddings(images)) < 1e-5
    state = load_baked(tmp_path/'b.safetensors')
    assert all(state[name].equal(t) for name, t in backbone.state_dict().items())

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_the_file_is_mapped(tmp_path):
    net = small_net(True)
    SparseMask.magnitude(net, .5).bake(net, tmp_path/'mapped.safetensors')
    fast = sparse.load(tmp_path/'mapped.safetensors')
    assert 'mapped.safetensors' in Path('/proc/self/maps').read_text() and fast.region.steps

def test_what_needs_torch_asks_for_the_model(tmp_path):
    body = small_net(False)
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2)).eval()
    path = tmp_path/'head.safetensors'
    SparseMask.magnitude(net, .3).bake(net, path)
    with pytest.raises(OpenTransError, match='load\\(path, model\\)'): sparse.load(path)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert far(sparse.load(path, copy.deepcopy(net))(x), net(x)) < 1e-5
    with pytest.raises(OpenTransError): sparse.load(path, small_net(True))
    assert describe(nn.Conv2d(3, 3, 1)) is None and describe(nn.Linear(2, 2)) is None

def test_errors_say_what_to_do(tmp_path):
    net, path = small_net(True), tmp_path/'net.safetensors'
    SparseMask.magnitude(net, .3).bake(net, path)
    with pytest.raises(OpenTransError, match='No file'): sparse.load(tmp_path/'none.safetensors')
    with pytest.raises(OpenTransError, match='threads'): sparse.load(path, threads=0)
    fast = sparse.load(path)
    for wrong in (torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32).double(), 'images'):
        with pytest.raises(OpenTransError, match='float32'): fast(wrong)
    with pytest.raises(OpenTransError, match='do not fit'): fast(torch.zeros(1, 4, 32, 32))
    assert fast(torch.zeros(0, 3, 32, 32)).shape[0] == 0
    SparseMask.ones(net).save(tmp_path/'mask.safetensors')
    with pytest.raises(FormatError): sparse.load(tmp_path/'mask.safetensors')

def changed_file(path, into, **change):
    "A file whose steps were changed by someone who knows how the checksum is made."
    import json
    tensors, meta = load_tensors(path)
    program = json.loads(meta['engine'])
    for name, value in change.pop('whole', {}).items(): program[name] = value
    place = change.pop('step', 0)
    program['steps'][place] |= change
    save_tensors(tensors, into, dict(meta, engine=json.dumps(program)), BAKED_FILE)
    return into

@pytest.mark.parametrize('change', [
    dict(x='elsewhere'), dict(layer='9.conv'), dict(pads=[-1, 0, 0, 0]), dict(pads=[0, 0]), dict(stride=[0, 0]),
    dict(stride=[1, 2]), dict(groups=0), dict(groups=5), dict(kind='sum'), dict(dilation=[1, 0]), dict(eps=[]),
    dict(norms=['3.bn1']), dict(residual='0'), dict(y='x'), dict(low='zero'), dict(step=1, kind='max', side=0),
    dict(whole=dict(outputs='nothing')), dict(whole=dict(outputs=[])), dict(whole=dict(mean=[.5])),
    dict(whole=dict(steps=[]))])
def test_forged_steps_are_refused(tmp_path, change):
    net = small_net(True)
    SparseMask.magnitude(net, .3).bake(net, tmp_path/'net.safetensors')
    change = copy.deepcopy(change)
    if 'steps' in change.get('whole', {}): change = dict(whole=dict(outputs='x'))
    forged = changed_file(tmp_path/'net.safetensors', tmp_path/'f.safetensors', **change)
    with pytest.raises(DamagedFile): sparse.load(forged)

def test_numbers_that_are_not_real_are_refused(tmp_path):
    "A complex tensor would be read without its imaginary part."
    net = small_net(True)
    SparseMask.magnitude(net, .3).bake(net, tmp_path/'net.safetensors')
    tensors,meta = load_tensors(tmp_path/'net.safetensors', kind=BAKED_FILE)
    for name in (next(name for name in tensors if name.endswith('running_mean')),
                 next(name for name in tensors if name.endswith('.bias'))):
        forged = {**tensors, name: tensors[name].to(torch.complex64)}
        save_tensors(forged, tmp_path/'f.safetensors', meta, BAKED_FILE)
        with pytest.raises(DamagedFile): sparse.load(tmp_path/'f.safetensors')

def test_damaged_files_are_refused_or_harmless(tmp_path):
    "Cut, altered and forged copies: an error, or a model that runs."
    net, path = small_net(True), tmp_path/'net.safetensors'
    SparseMask.magnitude(net, .3).bake(net, path)
    x = torch.randn(1, 3, 16, 16)
    check_reader(path, lambda _, place: sparse.load(place)(x), same=lambda out: out.numpy().tobytes(), count=60)

@pytest.mark.parametrize('out,is_told', [(lambda y, z: (dict(res2=y), z), False),
                                         (lambda y, z: (dict(res2=y), dict(res3=z)), False),
                                         (lambda y, z: dict(res3=z, res2=y), True), (lambda y, z: (z, y), True)])
@torch.no_grad()
def test_what_a_file_gives_is_what_the_model_gave(tmp_path, out, is_told):
    "A pair of maps and one more stays a pair: only of a backbone the maps alone are given."
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 4, 1)
        def forward(self, x):
            y = self.first(x).relu()
            return out(y, self.second(y))
    net, path = Maps().eval(), tmp_path/'maps.safetensors'
    SparseMask.magnitude(net, .5).bake(net, path)
    x = torch.randn(1, 3, 9, 6)
    if is_told: found = sparse.load(path)(x)
    else:
        with pytest.raises(OpenTransError, match='load\\(path, model\\)'): sparse.load(path)
        found = sparse.load(path, Maps().eval())(x)
    torch.testing.assert_close(found, net(x))
