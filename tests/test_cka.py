"CKA: each known defect of other tools as a test of ours, and the estimator against its closed form."
import copy, gc
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn
from opentrans.cka import cka, linear_cka, paper_cka, rbf_cka, same_layers
from opentrans.errors import OpenTransError
from opentrans.core import layers


def resnet(seed):
    torch.manual_seed(seed)
    m = ModifiedResNet([1, 1, 1, 1], 32, 4, image_size=64, width=16)
    for n, p in m.named_parameters():
        if n.endswith('bn3.weight'): nn.init.ones_(p)  # open_clip starts them at 0: every block an identity
    return m


@pytest.fixture(scope='module')
def images(): return torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def pair(): return resnet(0), resnet(1)


NAMES = ['conv2', 'layer1', 'layer2.0.conv3.weight', 'layer4']


def hsic1(K, L):
    n = len(K)
    K = K - K.diag().diag()
    L = L - L.diag().diag()
    return ((K*L.T).sum() + K.sum()*L.sum()/((n-1)*(n-2)) - 2/(n-2)*(K.sum(0)@L.sum(1)))/(n*(n-3))


def features(model, names, images):
    seen = {}
    hooks = []
    mods = dict(model.named_modules())
    for n in names:
        hooks.append(
            mods[n.removesuffix('.weight')].register_forward_hook(
                lambda m, a, o, n=n: seen.setdefault(n, []).append(o.detach().clone().double().flatten(1))))
    model.eval()
    with torch.no_grad(): [model(b) for b in images]
    for h in hooks: h.remove()
    return seen


def closed(fa, fb):
    def s(A, B): return sum(len(x)*hsic1(x@x.T, y@y.T) for x, y in zip(A, B))
    return (s(fa, fb)/(s(fa, fa)*s(fb, fb)).sqrt()).item()


@pytest.mark.parametrize('sizes', [[20, 20], [16, 16, 8], [16, 16, 5]])
def test_equals_the_closed_form_also_with_a_ragged_last_batch(pair, images, sizes):
    batches = images[:sum(sizes)].split(sizes)
    got = cka(*pair, batches, NAMES)
    fa, fb = features(pair[0], NAMES, batches), features(pair[1], NAMES, batches)
    want = [[closed(fa[i], fb[j]) for j in NAMES] for i in NAMES]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.attrs['estimator'] == 'minibatch unbiased HSIC' and got.attrs['examples'] == sum(sizes)


@pytest.mark.parametrize('last', [1, 2, 3])
def test_a_last_batch_that_is_too_small_is_left_out_and_named(pair, images, last):
    with pytest.warns(UserWarning, match=f'{last} examples came in a batch too small'):
        got = cka(*pair, images[:20+last].split(20), NAMES[:2])
    np.testing.assert_allclose(got, cka(*pair, [images[:20]], NAMES[:2]), atol=1e-12)
    assert got.attrs['left_out'] == last


@pytest.mark.parametrize('scale', [1e-30, 1e-4, 1e-2, 1e4, 1e20])  # cka-pytorch's epsilon gives 0.0000 at 1e-2
def test_scale_free(pair, images, scale):
    class Scaled(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m, self.out = m, nn.Identity()
        def forward(self, x): return self.out(self.m.layer1(self.m.stem(x))*scale)
    want = cka(*pair, [images[:16]], ['layer4'], ['layer1']).iloc[0, 0]
    assert cka(pair[0], Scaled(pair[1]), [images[:16]], ['layer4'], ['out']).iloc[0, 0] == pytest.approx(
        want, abs=1e-6)


def test_in_place_operations_after_the_layer(pair, images):
    "torch-cka keeps a reference to the output, which the in-place ReLU behind it then overwrites."
    m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3))
    safe = copy.deepcopy(m)
    safe[1] = nn.ReLU()
    a, b = (cka(x, pair[0], [images[:16]], ['0'], ['layer2']).iloc[0, 0] for x in (m, safe))
    assert a == b != cka(m, pair[0], [images[:16]], ['1'], ['layer2']).iloc[0, 0]


def test_tuples_tokens_first_and_functional_weights(images):
    v = VisionTransformer(64, 16, 32, 2, 2, 4., output_dim=16)
    names = ['transformer.resblocks.0.attn', 'transformer.resblocks.1.mlp.c_fc.weight', 'ln_post']
    got = cka(v, v, images[:24].split(12), names)
    assert got.attrs['reasons'] == {} and np.allclose(np.diag(got), 1) and got.iloc[0, 1] < 1
    class TokensFirst(nn.Module):  # (tokens, batch, channels), as older CLIP code has it
        def __init__(self, v):
            super().__init__()
            self.v, self.out = v, nn.Identity()
        def forward(self, x): return self.out(self.v.conv1(x).flatten(2).permute(2, 0, 1))
    t = cka(TokensFirst(v), v, [images[:24]], ['out'], ['conv1'], maps='pool')
    assert t.iloc[0, 0] == pytest.approx(1, abs=1e-6)
    r = resnet(0)
    got = cka(r, r, [images[:8]], ['attnpool.q_proj.weight', 'attnpool'])
    assert (got.attrs['reasons'] == {'attnpool.q_proj.weight': 'the layer did not run'}
            and got.loc['attnpool', 'attnpool'] == 1)


def test_unknown_names_are_an_error_and_order_is_the_callers(pair, images):
    with pytest.raises(OpenTransError, match="Unknown layer 'layer5'.*layer1"):
        cka(*pair, [images[:8]], ['layer4', 'layer5'])
    names = ['layer4', 'conv2', 'layer1']
    got = cka(*pair, [images[:8]], names, names[::-1])
    assert list(got.index) == names and list(got.columns) == names[::-1]
    # by default all layers that run: the attention pool's projections do not run as modules
    every = cka(pair[0], pair[0], [images[:8]])
    assert (list(every.index) == [layer.name for layer in layers(pair[0]) if layer.kind == 'conv']
            and every.attrs['reasons']['attnpool.q_proj.weight'] == 'the layer did not run')


def test_a_dead_layer_costs_its_own_row_only(pair, images):
    m = copy.deepcopy(pair[0])
    nn.init.zeros_(m.layer2[0].bn3.weight)
    nn.init.zeros_(m.layer2[0].bn3.bias)
    names = ['layer1', 'layer2.0.bn3', 'layer4']
    got, whole = cka(m, pair[1], images.split(20), names), cka(m, pair[1], images.split(20), ['layer1', 'layer4'])
    assert (got.loc['layer2.0.bn3'].isna().all()
            and got.attrs['reasons'] == {'layer2.0.bn3': 'features are constant over the examples'})
    np.testing.assert_allclose(got.loc[['layer1', 'layer4'], ['layer1', 'layer4']], whole, atol=1e-12)


def test_a_layer_that_breaks_late_is_nan_and_named(images):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Flatten()
            self.g = nn.Flatten()
            self.n = 0
        def forward(self, x):
            self.n += 1
            self.f(x)
            return self.g(x/0 if self.n == 3 else x)
    got = cka(Late(), resnet(0), images.split(10), ['f', 'g'], ['layer1'])
    assert (np.isnan(got.loc['g', 'layer1']) and np.isfinite(got.loc['f', 'layer1'])
            and got.attrs['reasons'] == {'g': 'features are NaN or infinite'})


def test_hooks_and_modes_are_restored_after_exceptions(images):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.d = nn.Conv2d(3, 4, 3), nn.Dropout()
        def forward(self, x):
            x = self.d(self.f(x))
            if len(x) < 20: raise KeyboardInterrupt
            return x
    a, b = Breaks().train(), resnet(0).train()
    b.layer1.eval()
    with pytest.raises(KeyboardInterrupt): cka(a, b, images[:30].split(20), ['f'], ['layer1'])
    assert all(m.training for m in a.modules()) and b.training and not any(m.training for m in b.layer1.modules())
    assert not any(x._forward_hooks for m in (a, b) for x in m.modules()) and torch.is_grad_enabled()
    first, again = (cka(b, b, [images[:20]], ['layer1', 'layer4']) for _ in range(2))
    assert first.equals(again)  # nothing accumulates between calls


def test_batches_of_all_forms_and_wrapped_models(pair, images):
    want = cka(*pair, images.split(20), NAMES[:2])
    class Batch: pass
    forms = dict(list=[[b, 0] for b in images.split(20)], dict=[dict(images=b) for b in images.split(20)],
                 dataloader=torch.utils.data.DataLoader(images, 20),
                 labelled=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(40)), 20),
                 generator=(b for b in images.split(20)))
    for k, loader in forms.items():
        np.testing.assert_allclose(cka(*pair, loader, NAMES[:2]), want, atol=1e-9, err_msg=k)
    class Framework(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.backbone = net
        @property
        def tower(self): return self.backbone
        def forward(self, x): return self.backbone(x)
    np.testing.assert_allclose(cka(Framework(pair[0]), nn.DataParallel(pair[1]), images.split(20), NAMES[:2]),
                               want, atol=1e-9)


def test_features_are_not_kept(pair, images):
    "Each output is gone before the next batch: memory does not grow with the data."
    import weakref
    alive = []
    most = []
    mods = dict(pair[0].named_modules())
    def watch(m, args, out):
        alive.append(weakref.ref(out.untyped_storage()))
        most.append(sum(r() is not None for r in alive))
    h = [mods[n].register_forward_hook(watch) for n in ('layer1', 'layer2', 'layer3', 'layer4')]
    try: cka(*pair, images.split(5), ['layer1', 'layer2', 'layer3', 'layer4'])
    finally: [x.remove() for x in h]
    gc.collect()
    assert len(most) == 32 and max(most) <= 3, max(most)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans(),
       st.sampled_from([linear_cka, rbf_cka]))
def test_invariances(n, p, q, seed, unbiased, f):
    g = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(n, p, generator=g, dtype=torch.float64), torch.randn(n, q, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(q, q, generator=g, dtype=torch.float64))[0]
    perm = torch.randperm(n, generator=g)
    v = f(X, Y, unbiased=unbiased)
    assert (f(X, X, unbiased=unbiased) == pytest.approx(1)
            and f(Y, X, unbiased=unbiased) == pytest.approx(v, abs=1e-9))
    assert (f(X, 1e-3*Y@Q + 5, unbiased=unbiased) == pytest.approx(v, abs=1e-7)
            and f(X[perm], Y[perm], unbiased=unbiased) == pytest.approx(v, abs=1e-9))
    assert v <= 1 + 1e-9 and (unbiased or v >= -1e-9)


def test_unrelated_features_are_zero_only_for_the_unbiased_estimator():
    X, Y = torch.randn(2, 512, 8192, generator=torch.Generator().manual_seed(0))
    assert linear_cka(X, Y) > .9 and abs(linear_cka(X, Y, unbiased=True)) < .02


def test_same_layers_is_table_nine(pair, images):
    frame = cka(*pair, images.split(20), NAMES)
    assert same_layers(frame).mean() == pytest.approx(np.diag(frame).mean())
    assert all(v == 1 for v in same_layers(cka(pair[0], copy.deepcopy(pair[0]), images.split(20), NAMES)).round(9))


# --- which axis holds the pictures

class Layout(nn.Module):
    "A linear map of 16 patches, whose output lies in memory in one of several ways."
    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.patch = nn.Conv2d(3, 12, 8, 8)
        self.f = nn.Linear(12, 7)
        self.out = nn.Identity()
    def forward(self, x):
        t = self.f(self.patch(x).flatten(2).mT)                     # (pictures, 16 tokens, 7 channels)
        windows = t.unflatten(1, (4, 4))                            # (pictures, 4 windows, 4 tokens, 7)
        forms = dict(pictures_first=t, tokens_first=t.transpose(0, 1), windows=windows.flatten(0, 1),
                     rows=t.flatten(0, 1), pictures_last=t.permute(1, 2, 0),
                     windows_outside=windows.transpose(0, 1).flatten(0, 1), mean_turned=t.mean(1).T, mean=t.mean(1))
        return self.out(forms[self.layout])


def layouts(layout):
    torch.manual_seed(0)
    a = Layout('pictures_first')
    b = Layout('pictures_first')
    twin = Layout(layout)
    twin.load_state_dict(a.state_dict())
    return a, b, twin


@pytest.fixture(scope='module')
def patches(): return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('layout', ['tokens_first', 'windows', 'rows', 'pictures_last'])
@pytest.mark.parametrize('n', [4, 7, 8, 15, 16, 17, 32])
def test_the_layout_of_a_layer_does_not_matter(layout, n, patches):
    "Also where tokens, tokens of a window, windows or channels are as many as the pictures."
    a, b, twin = layouts(layout)
    batches = patches[:n*(40//n)].split(n)
    for maps in ('flatten', 'pool'):
        # channels in the middle are no layout that has a pooling
        if maps == 'pool' and layout == 'pictures_last': continue
        want, got = (cka(m, b, batches, ['out'], maps=maps) for m in (a, twin))
        assert got.attrs['reasons'] == {} and got.iloc[0, 0] == pytest.approx(want.iloc[0, 0], abs=1e-6)


@pytest.mark.parametrize('n', [4, 7, 16])
def test_features_that_are_turned(n, patches):
    "(channels, pictures) in place of (pictures, channels), with as many of both."
    a, b, twin = layouts('mean_turned')
    a.layout = 'mean'
    want, got = (cka(m, b, patches[:28].split(n) if n < 16 else [patches[:16]], ['out']).iloc[0, 0]
                 for m in (a, twin))
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('n', [4, 8, 16])
def test_windows_that_cannot_be_sorted_are_not_compared(n, patches):
    """All first windows, then all second ones: the rows of a picture do not stand together, and no number is better
    than a wrong one."""
    a, b, twin = layouts('windows_outside')
    got = cka(twin, b, [patches[:n]], ['patch', 'out'])
    assert (np.isnan(got.loc['out', 'out']) and 'one after the other' in got.attrs['reasons']['out']
            and np.isfinite(got.loc['patch', 'patch']))


def test_as_many_classes_as_pictures_are_no_pictures(patches):
    "A table of class embeddings has nothing to do with the batch, however many classes there are."
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.f = nn.Parameter(torch.randn(8, 5)), nn.Linear(5, 5)
        def forward(self, x): return x.mean((2, 3))@self.f(self.words)[:3]
    got = cka(Classes(), Layout('pictures_first'), [patches[:8]]*2 + [patches[:5]], ['f', ''], ['patch'])
    assert (np.isnan(got.loc['f', 'patch'])
            and 'for 8 pictures the output is (8, 5), and for 3 the output (8, 5)' in got.attrs['reasons']['f']
            and np.isfinite(got.loc['', 'patch']))


def test_recurrent_layers_with_as_many_steps_as_examples():
    "torch's default has steps first; a tuple of outputs and states comes out."
    torch.manual_seed(0)
    x = torch.randn(12, 12, 6)
    first = nn.LSTM(6, 5, batch_first=True)
    second = nn.LSTM(6, 5)
    other = nn.LSTM(6, 5, batch_first=True)
    second.load_state_dict(first.state_dict())
    turned = nn.Sequential()
    turned.r = second
    turned.forward = lambda x: second(x.transpose(0, 1))
    want, got = (cka(m, other, [x], [n], ['']).iloc[0, 0] for m, n in ((first, ''), (turned, 'r')))
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('n', [4, 16])
def test_the_windows_of_a_swin_are_sorted_by_picture(n, patches):
    "As many pictures as windows, and as tokens of a window, against features sorted by hand."
    from timm.models.swin_transformer import SwinTransformer
    def swin(seed):
        torch.manual_seed(seed)
        return SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2),
                               num_heads=(2, 2), num_classes=0).eval()
    pair = (swin(0), swin(1))
    names = ['layers.0.blocks.0.attn.qkv', 'layers.0.blocks.1.attn.proj', 'layers.0.blocks.1.mlp.fc1',
             'layers.1.blocks.0.norm1']
    x = patches[:n]
    by_hand = [{k: v[0].reshape(n, -1) for k, v in features(m, names, [x]).items()} for m in pair]
    got = cka(*pair, [x], names)
    assert got.attrs['reasons'] == {}
    for name in names:
        assert got.loc[name, name] == pytest.approx(linear_cka(by_hand[0][name], by_hand[1][name], unbiased=True),
                                                    abs=1e-5)


def test_what_the_user_says_about_axes_counts(patches):
    "For a model that takes one number of pictures only, which cannot be run again on another."
    class Fixed(Layout):
        def forward(self, x):
            if len(x) != 16: raise ValueError('16 pictures, please')
            return super().forward(x)
    a, b, twin = layouts('tokens_first')
    fixed = Fixed('tokens_first')
    fixed.load_state_dict(a.state_dict())
    with pytest.raises(OpenTransError, match='fails on 3 pictures, ValueError.*say axis='):
        cka(fixed, b, [patches[:16]], ['out'])
    want = cka(a, b, [patches[:16]], ['out']).iloc[0, 0]
    for said in (({'out': 1}, 0), (1, {}), (1, None)):
        assert cka(fixed, b, [patches[:16]], ['out'], axis=said).iloc[0, 0] == pytest.approx(want, abs=1e-6)
    fixed.layout = 'pictures_first'
    assert cka(fixed, b, [patches[:16]], ['patch']).iloc[0,
                                                         0] == pytest.approx(
        cka(a, b, [patches[:16]], ['patch']).iloc[0, 0])
    with pytest.raises(OpenTransError, match="Unknown layer 'head'"):
        cka(a, b, [patches[:16]], ['out'], axis={'head': 0})
    with pytest.raises(OpenTransError, match='no 16 examples along axis 2'):
        cka(a, b, [patches[:16]], ['out'], axis=2)


def test_no_run_is_spent_where_nothing_is_in_doubt(pair, images):
    "Maps of convolutions need none besides the batches; tokens need one, of three pictures."
    seen = []
    handle = pair[0].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    try: cka(*pair, images.split(20), ['conv2', 'layer1', 'layer4'])
    finally: handle.remove()
    assert seen == [20, 20]
    v = VisionTransformer(64, 16, 32, 2, 2, 4., output_dim=16)
    v.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    cka(v, v, images[:16].split(8), ['transformer.resblocks.0.mlp.c_fc'])
    assert seen[2:] == [8, 3, 8]


# --- what an example is

def test_pooling_takes_the_mean_over_positions(patches):
    "Wherever a layer has its channels: last in a linear map of a map, in the middle of a 1-D convolution."
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 6, 8, 8)
            self.f = nn.Linear(6, 5)
            self.norm = nn.LayerNorm(5)
            self.line = nn.Conv1d(3, 4, 5)
        def forward(self, x):
            self.line(x.flatten(2)[..., :30])
            return self.norm(self.f(self.c(x).permute(0, 2, 3, 1)))
    torch.manual_seed(0)
    a = Last().eval()
    b = Last().eval()
    x = patches[:12]
    got = cka(a, b, [x], ['f', 'norm', 'line'], maps='pool')
    def pooled(m, name):
        f = m.f(m.c(x).permute(0, 2, 3, 1))
        return dict(f=f.mean((1, 2)), norm=m.norm(f).mean((1, 2)),
                    line=m.line(x.flatten(2)[..., :30]).mean(2))[name].detach()
    for name in got.index:
        assert got.loc[name, name] == pytest.approx(linear_cka(pooled(a, name), pooled(b, name), unbiased=True),
                                                    abs=1e-6)
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = a.c
            self.mlp = nn.Sequential(a.f, a.norm, nn.GELU())
            self.turn = nn.Identity()
        def forward(self, x): return self.turn(self.mlp(self.c(x).permute(0, 2, 3, 1)))
    got = cka(Turned(), b, [x], ['mlp', 'turn', 'c'], ['norm'], maps='pool')
    want = linear_cka(nn.functional.gelu(a.norm(a.f(a.c(x).permute(0, 2, 3, 1)))).mean((1, 2)).detach(),
                      pooled(b, 'norm'), unbiased=True)
    assert got.loc['mlp', 'norm'] == pytest.approx(want, abs=1e-6)
    # nothing in it says what its axes are
    assert np.isnan(got.loc['turn', 'norm']) and 'channels last' in got.attrs['reasons']['turn']


def test_a_layer_that_runs_twice_is_named(patches):
    "The last run counts, and a warning says so."
    twice = nn.Linear(3, 3)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), twice, nn.ReLU(), twice)
    with pytest.warns(UserWarning, match='ran more than once.*: 2'): got = cka(net, net, [patches[:8]], ['2'], [''])
    assert got.iloc[0, 0] == pytest.approx(1)


@pytest.mark.parametrize('out, reason',
                         [('whole', 'whole numbers'), ('nothing', 'no tensor'), ('scalar', 'no axis'),
                          ('nested', 'cannot be read')])
@pytest.mark.filterwarnings('ignore')
def test_an_output_that_is_no_feature_costs_its_own_row(out, reason, patches):
    "Indices, nothing at all, one number, tensors of several lengths."
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.o = nn.Conv2d(3, 4, 8, 8), nn.Identity()
        def forward(self, x):
            y = self.c(x)
            self.o(dict(whole=y.argmax(1), nothing='text', scalar=y.mean(),
                        nested=torch.nested.nested_tensor([t[0, :k+1] for k, t in enumerate(y[:3])]))[out])
            return y
    m = Odd()
    got = cka(m, m, [patches[:8]], ['c', 'o'])
    assert reason in got.attrs['reasons']['o'] and got.loc['c', 'c'] == pytest.approx(1)


def test_a_dict_that_begins_with_indices_gives_its_features(patches):
    "And complex numbers count as two each."
    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(3, 4)
            self.o = nn.Identity()
            self.z = nn.Identity()
        def forward(self, x):
            y = self.f(x.mean((2, 3)))
            self.o(dict(index=y.argmax(1), features=[y]))
            return self.z(torch.complex(y, 2*y))
    m = Out()
    assert np.allclose(cka(m, m, [patches[:8]], ['f', 'o', 'z']), 1)


# --- loaders and models that cannot be compared

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

@pytest.mark.parametrize('loader, words',
                         [([], 'gave no batch'), (iter(()), 'gave no batch'),
                          ([torch.rand(3, 8, 8)], r'largest batch was \(3, 8, 8\)'),
                          (torch.rand(9, 1, 3, 8, 8), r'largest batch was \(1, 3, 8, 8\)'),
                          ([torch.zeros(0, 3, 8, 8)], 'No batch had 4'),
                          ([torch.zeros(8, 3, 8, 8, dtype=torch.uint8)], 'they are uint8, its weights float32'),
                          ([torch.rand(8, 3, 8, 8).double()], 'they are float64'),
                          ([torch.rand(8, 3, 8, 8) > .5], 'they are bool'),
                          ([torch.full((8, 3, 8, 8), torch.nan)], 'images themselves hold NaN'),
                          ([None], 'not NoneType'), ([torch.tensor(1.)], 'not Tensor'), ([[]], 'not list'),
                          ([dict(label=1)], 'this one holds: label'),
                          ([[torch.rand(3, 8, 8), torch.rand(3, 8, 9), torch.rand(3, 8, 8)]], 'different sizes'),
                          ([dict(images=[1, 2])], 'not int'),
                          ([[dict(image=torch.rand(3, 8, 8)), dict(image=torch.rand(3, 9, 8))]],
                           'different sizes')])
def test_a_loader_that_does_not_fit_is_one_sentence(loader, words):
    "No raw error of torch, and nothing is left on the models."
    with pytest.raises(OpenTransError, match=words): cka(NET, NET, loader)
    assert not any(m._forward_hooks for m in NET.modules())


def test_pictures_in_any_packing(images):
    "Lists of pictures, of dicts, arrays, mappings of transformers: the same pictures."
    from collections import UserDict
    want = cka(resnet(0), resnet(1), [images[:8]], NAMES[:2])
    some = list(images[:8])
    for batch in (some, [dict(image=p, label=1) for p in some], images[:8].numpy(),
                  UserDict(pixel_values=images[:8]), dict(images=some), (images[:8], torch.zeros(8)),
                  [images[:8], dict(a=1)]):
        assert cka(resnet(0), resnet(1), [batch], NAMES[:2]).equals(want)


@pytest.mark.parametrize('side', [0, 1])
def test_a_model_of_nan_is_one_sentence(side, images):
    "Whichever of the two it is, and from whichever batch on."
    good, bad = resnet(0), resnet(1)
    bad.conv1.weight.data.fill_(torch.nan)
    models = [good, good]
    models[side] = bad
    which = ['first', 'second'][side]
    with pytest.raises(OpenTransError,
                       match=f"No layer of the {which} model can be compared: 'conv1' .features are NaN or "
                             f"infinite."):
        cka(*models, [images[:8]], ['conv1', 'layer4'])


def test_the_published_score_does_not_call_nan_one(images):
    "Constant channels count as one there; a model of NaN must not."
    bad = copy.deepcopy(NET)
    bad[0].weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match='Y has NaN'):
        assert np.isnan(paper_cka(NET, bad, [images[:4]], ['0']).item())
    with pytest.raises(OpenTransError, match='gave no batch'): paper_cka(NET, NET, [], ['0'])
    with pytest.raises(OpenTransError, match='they are uint8'):
        paper_cka(NET, NET, [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], ['0'])


def test_parametrised_layers_are_found(images):
    "The default layers of a model are layers that can be named, also where a weight is computed from others."
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(8, 4)))
        assert list(cka(net, net, [images[:8]]).index) == ['0.weight', '3.weight']


@pytest.mark.parametrize('options, words',
                         [(dict(kernel='cosine'), 'Unknown kernel'), (dict(kernel='rbf', sigma=0), 'no width'),
                          (dict(maps='mean'), 'not known'), (dict(maps=0), 'not known'),
                          (dict(layers_a=[]), 'no layer')])
def test_options_without_sense_are_refused_before_anything_runs(options, words):
    with pytest.raises(OpenTransError, match=words): cka(NET, NET, iter(()), **options)


def test_rbf_of_examples_that_are_mostly_equal_is_nan_with_a_reason():
    other = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    for n in range(5, 10):
        x = torch.zeros(n, 4)
        x[0] = 1
        for unbiased in (False, True):
            with pytest.warns(UserWarning, match='same kernel for all pairs'):
                assert np.isnan(rbf_cka(x, other[:n], unbiased=unbiased))
    model = nn.Sequential(nn.Linear(4, 4))
    frame = cka(model, model, [x], kernel='rbf')
    assert np.isnan(frame.to_numpy()).all() and 'same kernel' in frame.attrs['reasons']['0.weight']


def test_gram_takes_what_linear_cka_takes():
    from opentrans.cka import gram
    x = torch.randn(6, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(x), gram(torch.view_as_real(x)))
    with pytest.raises(OpenTransError, match='must be'): gram(torch.ones(6))
