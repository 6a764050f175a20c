"CKA: each known defect of other tools as a test of ours, and the estimator against its closed form."
import copy, gc, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn
from opentrans.cka import cka, linear_cka, rbf_cka, same_layers
from opentrans.core import OpenTransError, layers


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
    n, K, L = len(K), K - K.diag().diag(), L - L.diag().diag()
    return ((K*L.T).sum() + K.sum()*L.sum()/((n-1)*(n-2)) - 2/(n-2)*(K.sum(0)@L.sum(1)))/(n*(n-3))


def features(model, names, images):
    seen, hooks, mods = {}, [], dict(model.named_modules())
    for n in names: hooks.append(mods[n.removesuffix('.weight')].register_forward_hook(lambda m, a, o, n=n: seen.setdefault(n, []).append(o.detach().clone().double().flatten(1))))
    model.eval()
    with torch.no_grad(): [model(b) for b in images]
    for h in hooks: h.remove()
    return seen


def closed(fa, fb):
    s = lambda A, B: sum(len(x)*hsic1(x@x.T, y@y.T) for x, y in zip(A, B))
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
    with pytest.warns(UserWarning, match=f'{last} examples came in a batch too small'): got = cka(*pair, images[:20+last].split(20), NAMES[:2])
    np.testing.assert_allclose(got, cka(*pair, [images[:20]], NAMES[:2]), atol=1e-12)
    assert got.attrs['left_out'] == last


@pytest.mark.parametrize('scale', [1e-30, 1e-4, 1e-2, 1e4, 1e20])  # cka-pytorch's epsilon gives 0.0000 at 1e-2
def test_scale_free(pair, images, scale):
    class Scaled(nn.Module):
        def __init__(self, m): super().__init__(); self.m, self.out = m, nn.Identity()
        def forward(self, x): return self.out(self.m.layer1(self.m.stem(x))*scale)
    want = cka(*pair, [images[:16]], ['layer4'], ['layer1']).iloc[0, 0]
    assert cka(pair[0], Scaled(pair[1]), [images[:16]], ['layer4'], ['out']).iloc[0, 0] == pytest.approx(want, abs=1e-6)


def test_in_place_operations_after_the_layer(pair, images):
    "torch-cka keeps a reference to the output, which the in-place ReLU behind it then overwrites."
    m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3))
    safe = copy.deepcopy(m); safe[1] = nn.ReLU()
    a, b = (cka(x, pair[0], [images[:16]], ['0'], ['layer2']).iloc[0, 0] for x in (m, safe))
    assert a == b != cka(m, pair[0], [images[:16]], ['1'], ['layer2']).iloc[0, 0]


def test_tuples_tokens_first_and_functional_weights(images):
    v = VisionTransformer(64, 16, 32, 2, 2, 4., output_dim=16)
    names = ['transformer.resblocks.0.attn', 'transformer.resblocks.1.mlp.c_fc.weight', 'ln_post']
    got = cka(v, v, images[:24].split(12), names)
    assert got.attrs['reasons'] == {} and np.allclose(np.diag(got), 1) and got.iloc[0, 1] < 1
    class TokensFirst(nn.Module):  # (tokens, batch, channels), as older CLIP code has it
        def __init__(self, v): super().__init__(); self.v, self.out = v, nn.Identity()
        def forward(self, x): return self.out(self.v.conv1(x).flatten(2).permute(2, 0, 1))
    t = cka(TokensFirst(v), v, [images[:24]], ['out'], ['conv1'], maps='pool')
    assert t.iloc[0, 0] == pytest.approx(1, abs=1e-6)
    r = resnet(0)
    got = cka(r, r, [images[:8]], ['attnpool.q_proj.weight', 'attnpool'])
    assert got.attrs['reasons'] == {'attnpool.q_proj.weight': 'the layer did not run'} and got.loc['attnpool', 'attnpool'] == 1


def test_unknown_names_are_an_error_and_order_is_the_callers(pair, images):
    with pytest.raises(OpenTransError, match="Unknown layer 'layer5'.*layer1"): cka(*pair, [images[:8]], ['layer4', 'layer5'])
    names = ['layer4', 'conv2', 'layer1']
    got = cka(*pair, [images[:8]], names, names[::-1])
    assert list(got.index) == names and list(got.columns) == names[::-1]
    every = cka(pair[0], pair[0], [images[:8]])  # by default all layers that run: the attention pool's projections do not run as modules
    assert list(every.index) == [l.name for l in layers(pair[0]) if l.kind == 'conv'] and every.attrs['reasons']['attnpool.q_proj.weight'] == 'the layer did not run'


def test_a_dead_layer_costs_its_own_row_only(pair, images):
    m = copy.deepcopy(pair[0])
    nn.init.zeros_(m.layer2[0].bn3.weight); nn.init.zeros_(m.layer2[0].bn3.bias)
    names = ['layer1', 'layer2.0.bn3', 'layer4']
    got, whole = cka(m, pair[1], images.split(20), names), cka(m, pair[1], images.split(20), ['layer1', 'layer4'])
    assert got.loc['layer2.0.bn3'].isna().all() and got.attrs['reasons'] == {'layer2.0.bn3': 'features are constant over the examples'}
    np.testing.assert_allclose(got.loc[['layer1', 'layer4'], ['layer1', 'layer4']], whole, atol=1e-12)


def test_a_layer_that_breaks_late_is_nan_and_named(images):
    class Late(nn.Module):
        def __init__(self): super().__init__(); self.f, self.g, self.n = nn.Flatten(), nn.Flatten(), 0
        def forward(self, x): self.n += 1; self.f(x); return self.g(x/0 if self.n == 3 else x)
    got = cka(Late(), resnet(0), images.split(10), ['f', 'g'], ['layer1'])
    assert np.isnan(got.loc['g', 'layer1']) and np.isfinite(got.loc['f', 'layer1']) and got.attrs['reasons'] == {'g': 'features are NaN or infinite'}


def test_hooks_and_modes_are_restored_after_exceptions(images):
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.f, self.d = nn.Conv2d(3, 4, 3), nn.Dropout()
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
    forms = dict(list=[[b, 0] for b in images.split(20)], dict=[dict(images=b) for b in images.split(20)], dataloader=torch.utils.data.DataLoader(images, 20),
                 labelled=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(40)), 20), generator=(b for b in images.split(20)))
    for k, loader in forms.items(): np.testing.assert_allclose(cka(*pair, loader, NAMES[:2]), want, atol=1e-9, err_msg=k)
    class Framework(nn.Module):
        def __init__(self, net): super().__init__(); self.backbone = net
        @property
        def tower(self): return self.backbone
        def forward(self, x): return self.backbone(x)
    np.testing.assert_allclose(cka(Framework(pair[0]), nn.DataParallel(pair[1]), images.split(20), NAMES[:2]), want, atol=1e-9)


def test_features_are_not_kept(pair, images):
    "Each output is gone before the next batch: memory does not grow with the data."
    import weakref
    alive, most, mods = [], [], dict(pair[0].named_modules())
    def watch(m, args, out): alive.append(weakref.ref(out.untyped_storage())); most.append(sum(r() is not None for r in alive))
    h = [mods[n].register_forward_hook(watch) for n in ('layer1', 'layer2', 'layer3', 'layer4')]
    try: cka(*pair, images.split(5), ['layer1', 'layer2', 'layer3', 'layer4'])
    finally: [x.remove() for x in h]
    gc.collect()
    assert len(most) == 32 and max(most) <= 3, max(most)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans(), st.sampled_from([linear_cka, rbf_cka]))
def test_invariances(n, p, q, seed, unbiased, f):
    g = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(n, p, generator=g, dtype=torch.float64), torch.randn(n, q, generator=g, dtype=torch.float64)
    Q, perm = torch.linalg.qr(torch.randn(q, q, generator=g, dtype=torch.float64))[0], torch.randperm(n, generator=g)
    v = f(X, Y, unbiased=unbiased)
    assert f(X, X, unbiased=unbiased) == pytest.approx(1) and f(Y, X, unbiased=unbiased) == pytest.approx(v, abs=1e-9)
    assert f(X, 1e-3*Y@Q + 5, unbiased=unbiased) == pytest.approx(v, abs=1e-7) and f(X[perm], Y[perm], unbiased=unbiased) == pytest.approx(v, abs=1e-9)
    assert v <= 1 + 1e-9 and (unbiased or v >= -1e-9)


def test_unrelated_features_are_zero_only_for_the_unbiased_estimator():
    X, Y = torch.randn(2, 512, 8192, generator=torch.Generator().manual_seed(0))
    assert linear_cka(X, Y) > .9 and abs(linear_cka(X, Y, unbiased=True)) < .02


def test_same_layers_is_table_nine(pair, images):
    frame = cka(*pair, images.split(20), NAMES)
    assert same_layers(frame).mean() == pytest.approx(np.diag(frame).mean())
    assert all(v == 1 for v in same_layers(cka(pair[0], copy.deepcopy(pair[0]), images.split(20), NAMES)).round(9))
