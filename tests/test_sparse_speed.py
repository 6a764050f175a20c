"""The clock: engines in turns, layer by layer, and the command `speed`. No time is compared with another: that is a
benchmark's task."""
import json, sys
import pandas as pd
import pytest
import torch
from torch import nn
from opentrans import sparse
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.pruning import clock_prices, SparseMask
from test_cli import fails, opentrans
from test_sparse import own_cache, small_net # noqa: F401 (a fixture)

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.skipif(not sparse.has_llvm(), reason='llvmlite is not installed')]

def test_in_turns_calls_each_equally_often():
    calls = dict(a=0, b=0)
    def call(name): calls[name] += 1
    table = sparse.in_turns(dict(a=lambda: call('a'), b=lambda: call('b')), .01, most=7)
    assert calls['a'] == calls['b'] == len(table) + 1 and 2 <= len(table) <= 7 and (table >= 0).all(axis=None)

def test_engines_in_turns():
    net = small_net(True)
    masks = dict(half=SparseMask.magnitude(net, .5), whole=None)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    table = sparse.speed(net, masks, [(32, 40), (16, 16)], (1, 2), (1, 2), seconds=.01)
    assert len(table) == 2*2*2*2*len(sparse.engines_here()) and table.error.max() < 1e-5
    ours = table[table.engine == 'ours']
    assert (ours[ours['mask'] == 'half'].promised > 1.1).all() and (ours[ours['mask'] == 'whole'].promised == 1).all()
    assert (table.ms > 0).all() and (table.low <= table.high).all()
    assert all(t.equal(before[name]) for name, t in net.state_dict().items()) and torch.get_num_threads() == 1
    assert len(sparse.plot_speed(table).patches) == 2*len(ours)

def test_layer_by_layer():
    net = small_net(True)
    mask = SparseMask.magnitude(net, .3)
    table = sparse.layer_times(net, mask, (32, 32), seconds=.01)
    assert {*table.index} == {name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    assert (table.ms > 0).all() and (table.dense_ms > 0).all()
    masked = {f'{name}.weight': kept for name, kept in table.kept.items()}
    assert all(masked[name] == int(bits.sum()) for name, bits in mask.items())

def test_what_cannot_be_timed():
    net = small_net(True)
    for wrong, word in ((dict(engines=['tensorrt']), 'engine'), (dict(batches=[0]), 'batch'),
                        (dict(threads=[0]), 'threads'), (dict(sizes=[(0, 8)]), 'side'), (dict(sizes=[(8,)]), 'size')):
        with pytest.raises(OpenTransError, match=word): sparse.speed(net, **wrong)
    with pytest.raises(OpenTransError, match='model'): sparse.speed('RN50')
    with pytest.raises(OpenTransError, match='No layer'): sparse.layer_times(nn.Sequential(nn.ReLU()))
    with pytest.warns(UserWarning, match='cannot be exported'):
        table = sparse.speed(Forked().eval(), sizes=[(8, 8)], seconds=.01)
    assert {*table.engine} == {'torch', 'ours'}

class Forked(nn.Module):
    "What no exporter can follow."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
    def forward(self, x):
        if torch.jit.is_tracing(): raise RuntimeError('no tracing')
        return self.conv(x)

def test_the_command(tmp_path):
    out = opentrans('speed', '--densities', '0.2,1', '--size', '64x64', '--seconds', .05, '--engines', 'torch,ours',
                    '--out', tmp_path, '--json')
    rows = json.loads(out.stdout).values()
    assert {row['mask'] for row in rows} == {'0.2', '1'} and {row['engine'] for row in rows} == {'torch', 'ours'}
    assert (tmp_path/'speed.csv').exists() and (tmp_path/'speed.png').exists()
    layers = json.loads(opentrans('speed', '--densities', .1, '--size', '64x64', '--layers', '--json').stdout)
    assert len(layers) > 10 and all(row['ms'] > 0 for row in layers.values())

def test_errors_of_the_command(tmp_path):
    for flags, word in ((('--densities', '2'), 'densities'), (('--densities', 'few'), '0.1,0.3'),
                        (('--engines', 'abacus'), 'engine'),
                        (('--mask', tmp_path/'none'), 'none')):
        assert word in fails('speed', *flags)

class Shared(nn.Module):
    "A layer that is used twice, and one behind it in another region."
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
    def forward(self, x):
        x = self.twice(self.twice(self.first(x)).relu())
        return self.last(torch.sin(x))

def test_a_layer_that_is_used_twice_is_one_row():
    table = sparse.layer_times(Shared().eval(), size=(12, 10), seconds=.01)
    assert table.index.is_unique and {*table.index} == {'first', 'twice', 'last'}
    row = table.loc['twice']
    assert row.weights == 576 and row.multiply_adds == 2*576*120
    prices = clock_prices(Shared().eval(), (12, 10), seconds=.05)
    assert [*prices] == ['twice.weight', 'last.weight'] and min(prices.values()) > 0

def test_seconds_are_for_all_regions_together(monkeypatch):
    given = []
    def told(plan, seconds):
        given.append(seconds)
        return pd.Series(1., [name for name, _ in plan.parts()]).groupby(level=0).sum()
    monkeypatch.setattr(sys.modules['opentrans.sparse.speed'], '_milliseconds_by_name', told)
    sparse.layer_times(Shared().eval(), size=(12, 10), seconds=.4)
    assert given == pytest.approx([.1]*4)

def test_images_of_a_size_that_a_model_does_not_take():
    from test_heads import timm_vit
    with pytest.raises(OpenTransError, match="doesn't match model .*another size"):
        sparse.layer_times(timm_vit(), size=(24, 16))
    with pytest.raises(OpenTransError, match='another size'), pytest.warns(UserWarning):
        sparse.speed(timm_vit(), sizes=[(24, 16)])
    with pytest.raises(OpenTransError, match='another size'): clock_prices(timm_vit())
    for wrong in (8, (8,), (0, 8)):
        with pytest.raises(OpenTransError, match='size|side'): sparse.layer_times(Shared().eval(), size=wrong)
    with pytest.raises(OpenTransError, match='size'): sparse.speed(Shared().eval(), sizes=(8, 8))

def test_the_difference_of_every_engine_is_measured():
    table = sparse.speed(Shared().eval(), sizes=[(12, 10)], seconds=.01).set_index('engine')
    assert table.error['torch'] == 0 and 0 < table.error['ours'] < 1e-5
    if 'onnxruntime' in table.index: assert 0 < table.error['onnxruntime'] < 1e-5

def test_norms_of_zero_are_told():
    "The engine skips the convolutions before them, as nothing would in a trained network."
    clip = ClipBackbone.create('shapes-rn').eval()
    assert any(not m.weight.any() for m in clip.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with pytest.warns(UserWarning, match='batch norms have weights of zero'):
        sparse.speed(clip, sizes=[(64, 64)], engines=['torch', 'ours'], seconds=.01)
    with pytest.warns(UserWarning, match='batch norms have weights of zero'):
        sparse.layer_times(clip, size=(64, 64), seconds=.01)
