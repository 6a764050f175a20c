"Masks for the clock: weights at their price, in `imp` and alone."
import json
import pytest
import torch
from torch import nn
from opentrans import sparse
from opentrans.errors import OpenTransError
from opentrans.pruning import clock_prices, imp, SparseMask
from test_sparse import own_cache, small_net # noqa: F401 (a fixture)

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.skipif(not sparse.has_llvm(), reason='llvmlite is not installed')]

def still(model): "A round without training."

def test_prices_of_a_clock():
    net = small_net(True)
    prices = clock_prices(net, (64, 64), seconds=.2)
    mask = SparseMask.ones(net)
    assert [*prices] == mask.names and all(price > 0 for price in prices.values())
    mean = sum(price*mask[name].numel() for name, price in prices.items())/mask.total
    assert mean == pytest.approx(1, rel=1e-6)

def test_scores_are_divided_by_the_root_of_the_price():
    "Against the rule written out: sort by w^2 over the price."
    net = small_net(True)
    prices = {name: 4.**(i % 4) for i, name in enumerate(SparseMask.ones(net).names)}
    worth = {name: weight.detach()**2/prices[name] for name, weight in SparseMask.ones(net).weights(net).items()}
    mask, _ = imp(net, still, density=.3, p=.7, price=prices)
    least = torch.cat([w.flatten() for w in worth.values()]).sort(descending=True).values[mask.kept - 1]
    assert all(mask[name].equal(worth[name] >= least) for name in mask.names) and mask.info['price'] == 'given'
    plain, _ = imp(small_net(True), still, density=.3, p=.7)
    assert plain.kept == mask.kept and plain != mask and 'price' not in plain.info
    alike, _ = imp(small_net(True), still, density=.3, p=.7, price=dict.fromkeys(prices, 7.))
    assert alike == plain

def test_a_run_keeps_its_prices(tmp_path):
    "The clock says something else each time: a run that goes on reads what it began with."
    mask, history = imp(small_net(True), still, density=.5, p=.3, price='clock', checkpoint_dir=tmp_path)
    kept = json.loads((tmp_path/'prices.json').read_text())
    again, same = imp(small_net(True), still, density=.5, p=.3, price='clock', checkpoint_dir=tmp_path)
    assert again == mask and len(same) == len(history) and mask.info['price'] == 'clock'
    assert json.loads((tmp_path/'prices.json').read_text()) == kept
    with pytest.raises(OpenTransError, match='price'):
        imp(small_net(True), still, density=.5, p=.3, checkpoint_dir=tmp_path)
    kept['prices'].popitem()
    (tmp_path/'prices.json').write_text(json.dumps(kept))
    with pytest.raises(OpenTransError, match='damaged'):
        imp(small_net(True), still, density=.5, p=.3, price='clock', checkpoint_dir=tmp_path)

def test_prices_that_are_none():
    net = small_net(True)
    names = SparseMask.ones(net).names
    for price, word in (('gold', 'clock'), ({names[0]: 1.}, 'no price'), (dict.fromkeys(names, 0.), 'price of'),
                        (dict.fromkeys(names, float('nan')), 'price of')):
        with pytest.raises(OpenTransError, match=word): imp(net, still, density=.5, p=.3, price=price)
    with pytest.raises(OpenTransError, match='one of the two'):
        imp(net, still, density=dict.fromkeys(names, .5), price='clock')
    with pytest.raises(OpenTransError, match='rise'): clock_prices(net, densities=(.3, .1))
    with pytest.raises(OpenTransError, match='No layer'):
        clock_prices(nn.Sequential(nn.Linear(224, 4), nn.Linear(4, 4)))
