"Metrics against torchmetrics, over batches in any order, and over real processes."
import os, socket
import numpy as np, pytest, torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from opentrans.metrics import PanopticQuality, SemanticIoU, panoptic_map


def maps(seed, n, size=24, classes=4, pieces=9):
    g = torch.Generator().manual_seed(seed)
    res = []
    for _ in range(n):
        regions = torch.zeros(pieces, size, size, dtype=torch.bool)
        for r in regions:
            y, x = torch.randint(0, size - 8, (2,), generator=g).tolist()
            r[y:y+10, x:x+10] = True
        res.append(panoptic_map(regions, torch.randint(0, classes, (pieces,), generator=g)))
    return torch.stack(res)


def test_iou_equals_torchmetrics():
    tm = pytest.importorskip('torchmetrics')
    g = torch.Generator().manual_seed(0)
    target, pred = torch.randint(0, 5, (3, 40, 40), generator=g), torch.randint(0, 5, (3, 40, 40), generator=g)
    target[:, :5] = 255
    theirs = tm.classification.MulticlassJaccardIndex(5, average=None, ignore_index=255)(pred, target)
    ours = SemanticIoU(5).update(pred, target).compute()['iou']
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_pq_equals_torchmetrics():
    tm = pytest.importorskip('torchmetrics')
    things, stuff = {0, 1}, {2, 3}
    target = maps(1, 6)
    pred = torch.where(torch.rand(6, 24, 24, 1, generator=torch.Generator().manual_seed(2)) < .1, maps(3, 6), target.roll(1, 1))
    # a prediction that says something everywhere: torchmetrics takes its silent pixels out of the unions as well, panopticapi (and we) do not
    pred = torch.where(pred[..., :1] == 255, torch.tensor([2, 0]), pred)
    theirs = tm.detection.PanopticQuality(things, stuff, allow_unknown_preds_category=True, return_per_class=True, return_sq_and_rq=True)
    theirs.update(pred, target)  # class 255 is unknown to torchmetrics, and so void, as `ignore` is here
    ours = PanopticQuality([True, True, False, False]).update(pred, target).compute()['per_class']
    assert ours.tp.sum() > 5 and ours.fn.sum() > 5
    np.testing.assert_allclose(ours[['pq', 'sq', 'rq']].to_numpy(), theirs.compute().numpy(), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_order_and_split_do_not_matter(seed, cuts):
    "The sums of any split of the images, in any order, give the same figures."
    target, pred = maps(seed, cuts), maps(seed + 1, cuts)
    order = torch.randperm(cuts, generator=torch.Generator().manual_seed(seed))
    for new, a, b in ((lambda: SemanticIoU(4), pred[..., 0], target[..., 0]), (lambda: PanopticQuality([True, False, True, False]), pred, target)):
        a = a.clone(); a[(a == 255)] = 0
        whole, parts = new().update(a, b), new()
        for i in order: parts.merge(new().update(a[i], b[i]))
        for n in whole._sums: torch.testing.assert_close(getattr(parts, n), getattr(whole, n), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_renaming_classes_and_instances_changes_nothing(seed):
    target, pred = maps(seed, 1)[0], maps(seed + 1, 1)[0]
    perm = torch.tensor([2, 3, 0, 1] + [255]*252)
    isthing = [True, False, False, True]
    before = PanopticQuality(isthing).update(pred, target).compute()
    p, t = pred.clone(), target.clone()
    for x in (p, t): x[..., 0] = perm[x[..., 0]]; x[..., 1] = 97 - x[..., 1]
    after = PanopticQuality([isthing[i] for i in (2, 3, 0, 1)]).update(p, t).compute()
    np.testing.assert_allclose([before['pq'], before['sq'], before['rq']], [after['pq'], after['sq'], after['rq']], rtol=1e-12)


def worker(rank, port, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    from accelerate import Accelerator
    acc = Accelerator(cpu=True)
    m = SemanticIoU(4, ignore=254).update(maps(rank, 1)[0, ..., 0].clamp(max=3), maps(rank + 5, 1)[0, ..., 0].clamp(max=3))
    q = PanopticQuality([True]*4).update(maps(rank, 1), maps(rank + 5, 1))
    m, q = m.reduce(acc.reduce, acc.device), q.reduce(acc.reduce, acc.device)
    if acc.is_main_process: torch.save(dict(m=m.state(), q=q.state(), n=acc.num_processes), path)
    acc.end_training()


def test_two_processes_agree_with_one(tmp_path):
    "accelerate with two real processes gives the sums that one process gets from both halves."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path/'sums.pt')), nprocs=2)
    got = torch.load(tmp_path/'sums.pt', weights_only=True)
    assert got['n'] == 2
    m, q = SemanticIoU(4, ignore=254), PanopticQuality([True]*4)
    for r in range(2):
        m.update(maps(r, 1)[0, ..., 0].clamp(max=3), maps(r + 5, 1)[0, ..., 0].clamp(max=3)); q.update(maps(r, 1), maps(r + 5, 1))
    assert torch.equal(got['m']['confusion'], m.confusion)
    for n in q._sums: torch.testing.assert_close(got['q'][n], getattr(q, n), rtol=1e-12, atol=1e-12)
