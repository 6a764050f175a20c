"""Stitching across modules: any space, any family, masks, cost, save and resume, and the study of
opentrans.vit.esta_study."""
import json, math
from pathlib import Path
import numpy as np, pandas as pd, pytest, timm, torch
from hypothesis import given, settings, strategies as st
from mutations import check_reader, digest
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from opentrans.errors import OpenTransError
from opentrans.files import load_json
from opentrans.runtime import seeded
from opentrans.cost import cost
from opentrans.errors import OtherRun
from opentrans.files import load_tensors
from opentrans.pruning import SparseMask
from opentrans.vit.stitching import (
    ActiveStitch, apply_pst, least_squares, merge_stitch, stitch_configs, stitch_table, StitchableNet, StitchBias,
    StitchingLayer)
from opentrans.vit.stitch_training import (
    deploy, gradient_angles, ImportanceTracker, pareto_front, plot_angles, plot_pareto, StitchSampler,
    StitchTrainer)
from opentrans.vit.anchors import is_adapted

root = Path(__file__).resolve().parent.parent


def vit(d=16, depth=2, seed=0, classes=3, **kw):
    with seeded(seed):
        return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=d, depth=depth, num_heads=2,
                                             num_classes=classes, **kw).eval()


def resnet(width=8, depth=(1, 1, 1, 1), seed=0):
    with seeded(seed):
        m = ModifiedResNet(list(depth), 12, 4, image_size=64, width=width).eval()
        for n, p in m.named_parameters():
            if n.endswith('bn3.weight'): nn.init.constant_(p, .5)  # open_clip starts them at 0
        return m


def stir(net, seed=0, scale=.1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad: p.add_(scale*torch.randn(p.shape, generator=g))
    return net


def images(n, size=16, seed=0): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


depths = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None)
@given(depths, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_the_stitch_space(depths, kernel, stride, nearest, min_tail):
    """Every pair is legal and there once; anchors come first; layers are numbered without gaps and join the same
    anchors."""
    configs = stitch_configs(depths, kernel, stride, nearest, min_tail)
    assert ([c.front for c in configs[:len(depths)]] == list(range(len(depths)))
            and all(c.is_anchor for c in configs[:len(depths)]))
    stitches = configs[len(depths):]
    assert len(set(configs)) == len(configs)
    for c in stitches:
        assert c.front < c.end and (not nearest or c.end == c.front+1)
        assert 0 <= c.j < depths[c.front] and min_tail <= c.k < depths[c.end]
        if depths[c.front] == depths[c.end]: assert abs(c.j-c.k) < kernel
        else: assert c.j < c.k
    for ab in {(c.front, c.end) for c in stitches}:
        assert sorted({c.layer
                       for c in stitches
                       if (c.front, c.end) == ab}) == list(
            range(len({c.layer for c in stitches if (c.front, c.end) == ab})))
    def joins(cs): return {(c.front, c.end, c.j, c.k) for c in cs}
    assert joins(stitch_configs(depths, kernel, stride, nearest, min_tail+1)) == joins(
        c for c in configs if c.is_anchor or c.k > min_tail)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 4)]*3), min_size=2, max_size=2))
def test_stitches_of_staged_networks_keep_the_resolution(depths):
    "What comes out of block j has the resolution of what goes into block k."
    stage = [np.repeat(range(3), d) for d in depths]
    for c in stitch_configs(depths)[2:]: assert stage[0][c.j] == stage[1][c.k-1]
    joins = {(c.j, c.k) for c in stitch_configs(depths)[2:]}
    for s in (1, 2): assert (sum(depths[0][:s])-1, sum(depths[1][:s])) in joins


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 9))
def test_least_squares_is_the_pseudoinverse(d1, d2, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, tokens, d, generator=g).double() for d in (d1, d2))
    x[..., 0] = 1. if seed % 2 else x[..., 0]  # collinear with the ones: of many solutions the shortest
    M, c = least_squares(x, y)
    ones = torch.cat([x[0], torch.ones(tokens, 1)], 1)
    torch.testing.assert_close(torch.cat([M.T, c[None]]), torch.linalg.pinv(ones) @ y[0], atol=1e-7, rtol=1e-6)
    s = StitchingLayer(d1, d2).double()
    assert s.ls_init(x, y) <= torch.linalg.vector_norm(y).item()*(1+1e-12)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16]), st.integers(0, 4), st.booleans(),
       st.integers(0, 99))
def test_merged_is_unmerged_for_any_family(da, db, width, rank, ssb, seed):
    "Adapted and stirred at random: bit for bit the plain net before, equal after merging, at the unadapted price."
    net = StitchableNet([vit(8, da, seed), vit(width, db, seed+1)])
    x = images(2, seed=seed)
    net.init_stitches(images(6, seed=seed+1))
    before, table = [net(x, s) for s in range(len(net.configs))], stitch_table(net, (3, 16, 16), layernorm_cost=0)
    apply_pst(net, rank, ssb=ssb)
    assert all(torch.equal(net(x, s), y) for s, y in enumerate(before))
    stir(net, seed)
    with torch.no_grad():
        for s in table.index:
            m, y = merge_stitch(net, s), net(x, s)
            assert (m(x)-y).abs().max() <= 1e-5*max(1, y.abs().max()) and not any(map(is_adapted, m.modules()))
            assert (sum(p.numel() for p in m.parameters()) == table.params[s]
                    and cost(m, (3, 16, 16)).macs == table.flops[s])


def test_a_merged_stitch_lives_on_its_own():
    net = apply_pst(StitchableNet([vit(), vit(24, seed=1)]), 2)
    x, m = images(2), merge_stitch(net, 3)
    want = m(x)
    stir(net)
    assert torch.equal(m(x), want)
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in m.parameters())), m.parameters())
    assert net(x, 3).abs().max() > 0
    state = merge_stitch(net, 2).state_dict()
    assert (all(k.startswith(('front.tower.', 'tail.tower.', 'stitch.map.')) for k in state)
            and not any(k.endswith(('.A', '.B')) for k in state))


def test_masks_stay_through_adaptation_training_and_merging():
    """A palette of sparse towers: pruned weights are zero in every deployed network, and the price is that of what
    is left."""
    towers = [resnet(), resnet(seed=1)]
    masks = [SparseMask.random(t, d, seed=i) for i, (t, d) in enumerate(zip(towers, (.2, .5)))]
    for t, m in zip(towers, masks): m.apply(t).remove()
    net = StitchableNet(towers)
    x = images(4, 64)
    net.init_stitches(x)
    sparse, dense = stitch_table(net, (3, 64, 64), masks=masks), stitch_table(net, (3, 64, 64))
    assert (sparse.flops < dense.flops).all() and (sparse.params < dense.params).all()
    apply_pst(net, 2, masks=masks)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=.05)
    run = StitchTrainer(net, StitchSampler(sparse.flops, 3), opt,
                        loss=lambda out, y, teacher: (out-y).square().mean())
    run.fit([(x, torch.ones(4, 12))]*6)
    for s, m in deploy(net, run.sampler).items():
        c = net.configs[s]
        def kept(a, i): return [(p, masks[i][n]) for n, p in a.tower.named_parameters() if n in masks[i].names]
        for p, keep in kept(m, c.front) if c.is_anchor else kept(m.front, c.front)+kept(m.tail, c.end):
            assert (p[~keep] == 0).all()
        assert sparse.params[s] == sum((p != 0).sum().item() if p.dim() > 1 else p.numel()
                                       for a in ([m] if c.is_anchor else [m.front, m.tail])
                                       for p in a.parameters()) + (
            0 if c.is_anchor else sum(p.numel() for p in m.stitch.parameters()))


def test_clip_backbones_are_anchors():
    """The key of the house: names of a stitched tower are those of the tower, and a backbone is found inside what
    holds it."""
    from opentrans.clip import ClipBackbone
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    net = StitchableNet([clip.fresh_copy(), clip])
    assert [n for n, _ in net.anchors[1].tower.named_parameters()] == [n for n, _ in clip.visual.named_parameters()]
    x = clip.prepare(torch.rand(2, 3, 64, 64))
    with torch.no_grad(): torch.testing.assert_close(net(x), clip.visual(x))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=30), st.integers(1, 12),
       st.lists(st.floats(-1e6, 1e6), min_size=30, max_size=30), st.booleans(), st.booleans(), st.floats(1e-3, 1e3))
def test_the_sampler_is_a_distribution(costs, n, scores, standardize, relative, temperature):
    s = StitchSampler(costs, n, warmup=0, temperature=temperature, standardize=standardize, relative=relative)
    s.tracker.scores = torch.tensor(scores[:len(costs)], dtype=torch.float64)
    p, members = s.probs(), [i for m in s.intervals for i in m]
    assert torch.isfinite(p).all() and (p >= 0).all() and abs(p.sum().item()-1) < 1e-9
    assert sorted(members) == list(range(len(costs))) and len(s.intervals) <= n
    for m in s.intervals: assert abs(p[torch.as_tensor(m)].sum().item() - 1/len(s.intervals)) < 1e-9
    best = s.deploy()
    assert (len(best) == len(s.intervals) and [s.interval[b] for b in best] == sorted(set(s.interval))
            and (np.diff(s.costs[best]) >= 0).all())
    assert 0 < s.entropy() <= 1+1e-9 and 0 <= s.sample() < len(costs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e3)), max_size=40), st.floats(0, .99))
def test_the_running_mean_has_its_closed_form(updates, beta):
    t = ImportanceTracker(4, beta)
    for i, q in updates: t.update(i, q)
    for i in range(4):
        own = [q for k, q in updates if k == i]
        assert t.counts[i] == len(own)
        assert math.isclose(t.scores[i], sum((1-beta)*beta**(len(own)-1-n)*q for n, q in enumerate(own)),
                            rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_point_beats(points):
    c, v = zip(*points)
    front = pareto_front(c, v)
    assert front.any()
    for i, f in enumerate(front):
        assert f == all(not (c[j] <= c[i] and v[j] >= v[i] and (c[j] < c[i] or v[j] > v[i])) for j in range(len(c)))


def task(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    x = .3*torch.randn(n, 3, 16, 16, generator=g)
    x[torch.arange(n), y] += .3
    return x, y


def trainer(seed=0, full=False):
    net = StitchableNet([vit(8), vit(seed=1)])
    net.init_stitches(images(8))
    with seeded(seed): net = net if full else apply_pst(net, 2)
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=.05, momentum=.9)
    return StitchTrainer(net, StitchSampler(stitch_table(net, (3, 16, 16)).flops, 3, warmup=3, seed=seed), opt)


@pytest.mark.parametrize('full', [False, True])
def test_a_step_is_the_gradient_of_both_losses(full):
    "One step of plain SGD equals a step along the gradient of teacher's and stitch's loss, written out."
    run = trainer(full=full)
    run.optimizer.param_groups[0]['momentum'] = 0
    twin = trainer(full=full)
    x, y = task(6, 0)
    said = run.step(x, y)
    out = twin.net(x)
    student = twin.net(x, said['stitch'])
    loss = F.cross_entropy(out, y) + .5*F.cross_entropy(student, y) + .5*F.cross_entropy(student, out.argmax(1))
    loss.backward()
    for (n, a), b in zip(run.net.named_parameters(), twin.net.parameters()):
        if b.grad is None: assert torch.equal(a, b), n
        else: torch.testing.assert_close(a, b-.05*b.grad, atol=1e-6, rtol=1e-5)
    assert abs(said['loss']+said['teacher']-loss.item()) < 1e-5 and run.sampler.tracker.counts[said['stitch']] == 1


def test_an_interrupted_run_ends_where_the_other_does(tmp_path):
    "Also when the process dies while it writes: the file before stays."
    batches = [task(6, i) for i in range(9)]
    one, two = trainer(), trainer()
    one.fit(batches)
    two.fit(batches[:4])
    two.save(tmp_path/'run.safetensors')
    good = (tmp_path/'run.safetensors').read_bytes()
    with pytest.raises(OpenTransError):
        two.net.register_parameter('odd', nn.Parameter(torch.zeros(1)))
        two.load(tmp_path/'run.safetensors')  # another family: nothing is changed
    assert (tmp_path/'run.safetensors').read_bytes() == good
    three = trainer(seed=5)
    three.load(tmp_path/'run.safetensors')
    three.fit(batches[4:])
    for (n, p), q in zip(one.net.named_parameters(), three.net.named_parameters()): assert torch.equal(p, q[1]), n
    assert one.sampler.deploy() == three.sampler.deploy() and three.steps == 9
    (tmp_path/'run.safetensors').write_bytes(good[:len(good)//2])
    with pytest.raises(OpenTransError, match='not a whole safetensors file'): three.load(tmp_path/'run.safetensors')


def test_diverged_training_stops():
    run = trainer()
    with torch.no_grad(): next(p for p in run.net.parameters() if p.requires_grad).fill_(float('nan'))
    with pytest.raises(OpenTransError, match='diverged'): run.step(*task(4, 0))


def test_angles_leave_the_net_as_it_was():
    net = apply_pst(StitchableNet([vit(8), vit(seed=1)]), 2)
    flags = [p.requires_grad for p in net.parameters()]
    a = gradient_angles(net, task(6, 0), [2, 3])
    assert ([p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
            and 0 <= a[0, 1] <= 180)


def test_the_experiment_runs_and_resumes(tmp_path):
    """The study 'esta' at its smallest: a second call does nothing again, other sizes are refused, the file says
    how it was made."""
    from opentrans.experiments import run_study
    jobs = tmp_path/'.runs'/'smoke'/'esta'
    run_study('esta', tmp_path, seeds=1, scale='smoke')
    first = {p: p.stat().st_mtime_ns for p in jobs.glob('*-*.json')}
    (jobs/'anchor1-0.json').unlink()
    run_study('esta', tmp_path, seeds=1, scale='smoke')
    assert len(first) == 6 and [p.name for p, t in first.items() if p.stat().st_mtime_ns != t] == ['anchor1-0.json']
    d = load_json(tmp_path/'esta-smoke-1seeds.json')
    assert ({'command', 'date', 'processor', 'cores', 'python', 'torch', 'timm'} <= set(d['run'])
            and d['seeds'] == [0]
            and set(d['results']['0']) == {'esta', 'uniform', 'snnet', 'source', 'anchor 0', 'anchor 1'})
    for k, v in d['summary'].items(): assert v['values'] == [v['mean']], k
    (jobs/'scale.json').write_text(json.dumps({'dims': [1]}))
    with pytest.raises(OtherRun, match='other sizes'): run_study('esta', tmp_path, seeds=1, scale='smoke')


def test_the_committed_result_is_of_the_present_study():
    d = load_json(root/'docs'/'results'/'esta-5seeds.json')
    from opentrans.vit import esta_study as esta
    assert d['seeds'] == list(range(5)) and d['scale'] == json.loads(json.dumps(esta.SCALES['toy']))
    again = pd.DataFrame({s: esta.summary(r) for s, r in d['results'].items()})
    for k, v in d['summary'].items():
        assert np.allclose(again.loc[k], v['values'], equal_nan=True), k
        assert math.isclose(v['mean'], np.mean(v['values'])) and math.isclose(v['std'], np.std(v['values'], ddof=1))


# --- files, batches and models that are not as they should be ---

def scheduled():
    run = trainer()
    run.optimizer = torch.optim.AdamW([p for p in run.net.parameters() if p.requires_grad], lr=1e-2)
    run.schedule = torch.optim.lr_scheduler.MultiStepLR(run.optimizer, [3, 6], gamma=.1)
    return run


def state_of(run):
    return digest(run.net, run.optimizer, run.sampler.state_dict(), run.steps, run.schedule.state_dict(),
                  [g['lr'] for g in run.optimizer.param_groups])


def test_damaged_and_forged_trainings_are_refused_whole(tmp_path):
    "Weights, optimizer, sampler and schedule are those of before, or all of them are the file's."
    path = tmp_path/'run.safetensors'
    run = scheduled()
    batches = [task(6, i) for i in range(4)]
    run.fit(batches)
    run.save(path)
    def whole():
        run.load(path)
        return run
    def read(target, file):
        target.load(file)
        return target
    check_reader(path, read, whole, state_of, state_of)
    run.fit(batches[:1])  # and it trains on


def test_a_training_of_opentrans_0_1_still_loads(tmp_path):
    "It had the same entries, without a version and a checksum."
    path, run = tmp_path/'run.safetensors', scheduled()
    run.fit([task(6, i) for i in range(4)])
    run.save(path)
    tensors, meta = load_tensors(path)
    meta.pop('version')
    save_file(tensors, path, metadata=meta)
    other = scheduled()
    other.load(path)
    assert state_of(other) == state_of(run)


def test_a_schedule_goes_on_where_it_was(tmp_path):
    """Its milestones have numbers as keys, which JSON has not: the rate falls at the same steps as in an unbroken
    run."""
    batches, path = [task(6, i) for i in range(8)], tmp_path/'run.safetensors'
    one = scheduled()
    two = scheduled()
    three = scheduled()
    one.fit(batches)
    two.fit(batches[:4])
    two.save(path)
    three.load(path)
    three.fit(batches[4:])
    assert one.optimizer.param_groups[0]['lr'] == three.optimizer.param_groups[0]['lr'] == pytest.approx(1e-4)
    assert state_of(one) == state_of(three)
    other = scheduled()
    other.schedule = torch.optim.lr_scheduler.MultiStepLR(other.optimizer, [2, 5], gamma=.1)
    before = state_of(other)
    with pytest.raises(OpenTransError, match='does not fit the trainer.*milestones'): other.load(path)
    assert state_of(other) == before


def test_a_diverged_training_is_not_saved_over_a_good_one(tmp_path):
    path, run = tmp_path/'run.safetensors', scheduled()
    run.fit([task(6, 0)])
    run.save(path)
    good, weights = path.read_bytes(), digest(run.net)
    x, y = task(6, 1)
    with pytest.raises(OpenTransError, match='has diverged'): run.step(x*float('nan'), y)
    assert digest(run.net) == weights
    with torch.no_grad(): next(p for p in run.net.parameters() if p.requires_grad).fill_(float('inf'))
    with pytest.raises(OpenTransError, match='not finite.*nothing is saved'): run.save(path)
    assert path.read_bytes() == good


def test_batches_and_numbers_of_a_training_are_checked():
    "One sentence each, with no weight changed."
    run, (x, y) = trainer(), task(6, 0)
    before = digest(run.net)
    odd = [(((x*255).byte(), y), 'torch.uint8'), ((x, y+1), 'the model has 3 classes'),
           ((x, y[:4]), 'give labels of'), (x, 'A batch must be'), ((x, y.float()), 'whole numbers')]
    for batch, why in odd:
        with pytest.raises(OpenTransError, match=why): run.fit([batch])
    with pytest.raises(OpenTransError, match='no batches'): run.fit([])
    with pytest.raises(OpenTransError, match='the model has 3 classes'): gradient_angles(run.net, (x, y+1), [2, 3])
    assert digest(run.net) == before
    for kw, why in ((dict(n_intervals=0), 'n_intervals=0'), (dict(n_intervals=1.5), 'n_intervals=1.5'),
                    (dict(temperature=float('nan')), 'temperature=nan'), (dict(warmup=-1), 'warmup=-1'),
                    (dict(seed=2**64), 'seed=18,?446'), (dict(costs=[1., float('nan')]), 'numbers from 0 on'),
                    (dict(costs=[]), 'numbers from 0 on')):
        with pytest.raises(OpenTransError, match=why): StitchSampler(**{**dict(costs=[1., 2.]), **kw})
    for a in (-.1, 1.1, float('nan')):
        with pytest.raises(OpenTransError, match='it must be a number from 0 to 1'):
            StitchTrainer(run.net, run.sampler, run.optimizer, a=a)
    with pytest.raises(OpenTransError, match='draws from 2 stitches'):
        StitchTrainer(run.net, StitchSampler([1., 2.]), run.optimizer)
    with pytest.raises(OpenTransError, match='torch.uint8'): run.net.init_stitches((x*255).byte())
    with pytest.raises(OpenTransError, match='NaN or infinite'): run.net.init_stitches(x*float('nan'))


def test_an_adaptation_that_fails_changes_nothing():
    """A layer of whole numbers, a rank that is none, masks of another tower: the family is as it was, and can be
    adapted after all."""
    def family(): return StitchableNet([vit(8), vit(seed=1)])
    codes = family()
    layer = codes.anchors[1].tower.blocks[1].attn.proj
    layer.weight = nn.Parameter((layer.weight*50).to(torch.int8), requires_grad=False)
    odd = SparseMask.magnitude(resnet(), .5)
    cases = [(codes, dict(attn_ranks=2), 'holds whole numbers'),
             (family(), dict(attn_ranks=1.5), 'attn_ranks=1.5'),
             (family(), dict(attn_ranks=[2, -1]), 'attn_ranks=-1'),
             (family(), dict(attn_ranks=2, stitch_rank=lambda d: .5), 'stitch_rank=0.5'),
             (family(), dict(attn_ranks=2, masks=[odd]), '1 masks for 2 anchors'),
             (family(), dict(attn_ranks=2, masks=[odd, None]), 'that the anchor lacks'),
             (family(), dict(attn_ranks=[2]), 'one for each of the 2 anchors')]
    for net, kw, why in cases:
        before, kinds = digest(net), [type(m) for m in net.modules()]
        with pytest.raises(OpenTransError, match=why): apply_pst(net, **kw)
        assert digest(net) == before and [type(m) for m in net.modules()] == kinds
    apply_pst(net, 2)


@pytest.mark.parametrize('layer, x',
                         [(nn.LayerNorm(6), torch.randn(2, 5, 6)), (nn.BatchNorm2d(6), torch.randn(2, 6, 4, 4)),
                          (nn.ConvTranspose2d(4, 6, 2), torch.randn(2, 4, 3, 3)),
                          (nn.BatchNorm2d(6, affine=False), torch.randn(2, 6, 4, 4)),
                          (nn.Linear(4, 6), torch.randn(2, 5, 4))])
def test_a_bias_of_a_stitch_has_a_number_for_each_output(layer, x):
    """Of norms, and of transposed convolutions, whose weight has the outputs in its second dimension; the merged
    layer computes the same."""
    if not list(layer.parameters()):
        with pytest.raises(OpenTransError, match='no weights in floating point'):
            StitchBias(layer, [3], ActiveStitch(3))
        return
    around = StitchBias(layer.eval(), [3], ActiveStitch(3))
    nn.init.normal_(around.bias['3'])
    assert around.bias['3'].shape == (6,)
    torch.testing.assert_close(around.merged(3)(x), around(x), atol=1e-5, rtol=1e-5)
    assert (around(x)-layer(x)).abs().max() > .01


def test_labels_of_plots_are_names():
    "A legend may be called like a formula."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    table = pd.DataFrame(dict(flops=[1e6, 2e6, 3e6], value=[.1, .2, .3]))
    plot_pareto(table, [0, 2], label='$x_{$').figure.canvas.draw()
    plot_angles(torch.tensor([80., 90., 100.]), label='$x_{$').figure.canvas.draw()
    plt.close('all')
