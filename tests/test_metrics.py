"Metrics against torchmetrics, over batches in any order, and over real processes."
import os
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from opentrans.errors import OpenTransError
from opentrans.data import match_segments, panoptic_map, PanopticQuality, SemanticIoU
from forked import two_processes


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
    pred = torch.where(torch.rand(6, 24, 24, 1, generator=torch.Generator().manual_seed(2)) < .1, maps(3, 6),
                       target.roll(1, 1))
    # a prediction that says something everywhere: torchmetrics takes its silent pixels out of the unions as well,
    # panopticapi (and we) do not
    pred = torch.where(pred[..., :1] == 255, torch.tensor([2, 0]), pred)
    theirs = tm.detection.PanopticQuality(things, stuff, allow_unknown_preds_category=True, return_per_class=True,
                                          return_sq_and_rq=True)
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
    for new, a, b in ((lambda: SemanticIoU(4), pred[..., 0], target[..., 0]),
                      (lambda: PanopticQuality([True, False, True, False]), pred, target)):
        a = a.clone()
        a[(a == 255)] = 0
        whole, parts = new().update(a, b), new()
        for i in order: parts.merge(new().update(a[i], b[i]))
        for n in whole._sums:
            torch.testing.assert_close(getattr(parts, n), getattr(whole, n), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_renaming_classes_and_instances_changes_nothing(seed):
    target, pred = maps(seed, 1)[0], maps(seed + 1, 1)[0]
    perm = torch.tensor([2, 3, 0, 1] + [255]*252)
    isthing = [True, False, False, True]
    before = PanopticQuality(isthing).update(pred, target).compute()
    p, t = pred.clone(), target.clone()
    for x in (p, t):
        x[..., 0] = perm[x[..., 0]]
        x[..., 1] = 97 - x[..., 1]
    after = PanopticQuality([isthing[i] for i in (2, 3, 0, 1)]).update(p, t).compute()
    np.testing.assert_allclose([before['pq'], before['sq'], before['rq']], [after['pq'], after['sq'], after['rq']],
                               rtol=1e-12)


def count_part(rank, iou, quality):
    "Count one of two pictures."
    iou.update(maps(rank, 1)[0, ..., 0].clamp(max=3), maps(rank + 5, 1)[0, ..., 0].clamp(max=3))
    quality.update(maps(rank, 1), maps(rank + 5, 1))


def test_two_processes_agree_with_one(tmp_path):
    "accelerate with two real processes gives the sums that one process gets from both halves."
    script = Path(__file__).with_name('two_sums.py')
    environment = dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    for process in two_processes(script, tmp_path/'sums.pt', env=environment, cwd=tmp_path):
        assert process.returncode == 0, process.stderr[-3000:]
    told = torch.load(tmp_path/'sums.pt', weights_only=True)
    assert told['processes'] == 2
    iou, quality = SemanticIoU(4, ignore=254), PanopticQuality([True]*4)
    for rank in range(2): count_part(rank, iou, quality)
    assert torch.equal(told['iou']['confusion'], iou.confusion)
    for name in quality._sums:
        torch.testing.assert_close(told['quality'][name], getattr(quality, name), rtol=1e-12, atol=1e-12)


# types of labels

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
            torch.uint64, 'u1', 'i1', '<u2', '>u2', '<i4', '>i4', '>i8', '<u8']

def as_type(x, kind): return x.numpy().astype(kind) if isinstance(kind, str) else x.to(kind)


@pytest.mark.parametrize('kind', INTEGERS)
def test_every_integer_type_is_counted_alike(kind):
    "A type is how a file or a program stores numbers, and no part of the truth."
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randint(0, 5, (2, 12, 12), generator=g), torch.randint(0, 6, (2, 12, 12), generator=g)
    for ignore in (5, 100, 257, 65535, -1, 2**40):
        wanted = SemanticIoU(5, ignore).update(pred, torch.where(target == 5, ignore, target))
        fits = -128 <= ignore <= 127
        truth = torch.where(target == 5, ignore if fits else 4, target)
        if ignore == -1 and ('u' in str(kind)): continue # -1 cannot be stored
        got = SemanticIoU(5, ignore).update(as_type(pred, kind), as_type(truth, kind))
        if fits: assert torch.equal(got.confusion, wanted.confusion) and got.ignored == wanted.ignored
        else:
            assert got.confusion.sum() == truth.numel() and got.ignored == 0, (
                'a label that the type cannot hold occurs nowhere')
    pairs = maps(3, 2, classes=4)
    signed = torch.where(pairs[..., :1] == 255, torch.tensor([100, 0]), pairs)
    wanted = PanopticQuality([True]*4, ignore=100).update(signed, signed.roll(1, 1))
    got = PanopticQuality([True]*4, ignore=100).update(as_type(signed, kind), as_type(signed.roll(1, 1), kind))
    for n in wanted._sums: assert torch.equal(getattr(got, n), getattr(wanted, n))


def test_truth_values_are_two_classes():
    truth = torch.tensor([[True, False, True]])
    assert SemanticIoU(2).update(truth, truth.long()).update(truth.numpy(), truth).compute()['miou'] == 1


@pytest.mark.parametrize('make',
                         [lambda: SemanticIoU(3, ignore=-1), lambda: SemanticIoU(3, ignore=511),
                          lambda: SemanticIoU(3, ignore=65535)])
def test_a_label_that_is_no_class_is_refused_whatever_it_wraps_to(make):
    "255 in bytes is -1 in signed ones, and 511 modulo 256: neither was meant."
    m, bad = make(), torch.full((2, 2), 255, dtype=torch.uint8)
    with pytest.raises(OpenTransError, match='truth has labels outside 0..2: 255'):
        m.update(torch.zeros(2, 2, dtype=torch.uint8), bad)
    assert m.confusion.sum() == m.ignored == 0
    q = PanopticQuality([True]*3, ignore=m.ignore)
    with pytest.raises(OpenTransError, match='outside 0..2: 255'):
        q.update(torch.zeros(2, 2, 2, dtype=torch.uint8), bad[..., None].expand(2, 2, 2))


@pytest.mark.parametrize('bad',
                         [torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.float16),
                          torch.zeros(2, 2, dtype=torch.complex64), np.zeros((2, 2)), [[.5, 1.]], [['a']], None,
                          'abc', np.array([['1']]), np.array([[None]]), torch.zeros(2),
                          torch.zeros((), dtype=torch.long), torch.zeros(1, 1, 2, 2, dtype=torch.long)])
def test_what_are_no_labels_is_one_sentence(bad):
    good = torch.zeros(2, 2, dtype=torch.long)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(OpenTransError, match='must be|differ'): SemanticIoU(2).update(*pair)
        with pytest.raises(OpenTransError, match='must be'): PanopticQuality([True, False]).update(*pair)


@pytest.mark.parametrize('classes, ignore',
                         [(0, 255), (-3, 255), (2.5, 255), ('3', 255), (None, 255), (3, None), (3, 255.),
                          (3, '255'), (10**9, -1), (10**30, -1), (True, 255)])
def test_numbers_of_classes_that_cannot_be(classes, ignore):
    "A table of 10^18 entries is no raw error of memory."
    with pytest.raises(OpenTransError, match='expected whole numbers'): SemanticIoU(classes, ignore)


def test_a_picture_without_pixels_counts_nothing():
    assert SemanticIoU(2).update(torch.zeros(0, 5, dtype=torch.long),
                                 torch.zeros(0, 5, dtype=torch.long)).confusion.sum() == 0
    assert PanopticQuality([True]).update(torch.zeros(0, 5, 2, dtype=torch.long),
                                          torch.zeros(0, 5, 2, dtype=torch.long)).fp.sum() == 0


def test_a_constant_prediction_of_the_only_class_is_told_by_its_figures():
    "Labels 0 and 255 with two names: mean IoU is 1, and the result says why."
    truth = torch.zeros(4, 4, dtype=torch.uint8)
    truth[:2] = 255
    r = SemanticIoU(2).update(torch.zeros(4, 4).byte(), truth).compute()
    assert (r['miou'], r['never_true'], r['ignored']) == (1, [1], 8)
    assert SemanticIoU(2, ignore=254).update(torch.zeros(4, 4).byte(), truth % 254).compute()['never_true'] == []


def test_groups_are_indices_of_classes():
    m = SemanticIoU(3).update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert m.compute(groups=dict(a=[0], b=np.array([1, 2]), none=[]))['groups']['b'] == 1
    for bad in ([3], [-1], [True, False, True], [.5], 'ab', None, [[0]]):
        with pytest.raises(OpenTransError, match="group 'a' must be"): m.compute(groups=dict(a=bad))


def test_a_state_is_put_back_whole_or_not_at_all():
    m = PanopticQuality([True]*3).update(*(torch.ones(2, 2, 2).long(),)*2)
    good = m.state()
    for bad in (None, {}, dict(good, fn=None), dict(good, fn=torch.zeros(2)),
                dict(good, fn=torch.full((3,), torch.nan)), dict(good, fn=-torch.ones(3))):
        if bad: bad['iou'] = bad['iou']+1
        with pytest.raises(OpenTransError, match='no state of'): m.load_state(bad)
        assert all(torch.equal(v, good[n]) for n, v in m.state().items())
    assert torch.equal(PanopticQuality([True]*3).load_state(good).tp, m.tp)


def test_regions_and_their_classes_belong_together():
    masks = torch.ones(2, 3, 3, dtype=torch.bool)
    assert torch.equal(panoptic_map(masks.byte(), [0, 1]),
                       panoptic_map(masks, torch.tensor([0, 1], dtype=torch.uint8)))
    assert panoptic_map(masks[:0], []).shape == (3, 3, 2)
    for regions, classes, crowd in ((masks, [0], None), (masks, [0, 1], [True]), (masks.long(), [0, 1], None),
                                    (masks.float(), [0, 1], None), (masks[0], [0, 1, 2], None),
                                    (masks, [.5, 1.], None)):
        with pytest.raises(OpenTransError, match='[Rr]egions'): panoptic_map(regions, classes, crowd=crowd)


def test_as_many_segments_as_pixels_fit_into_memory():
    "A table of all pairs would have 4 * 10^9 entries."
    x = torch.stack([torch.zeros(256, 256).long(), torch.arange(65536).view(256, 256)], -1)
    p, t = match_segments(x, x)
    assert len(p) == len(t) == 65536 and p.matched.all() and (t.iou == 1).all()

@pytest.mark.parametrize('numbers', [lambda n: n, lambda n: n*2**40 + 7, lambda n: n + 2**50])
def test_numbers_of_instances_of_any_size_are_matched_alike(numbers):
    "Small numbers are counted in a table, large ones are sorted: the same segments either way."
    generator = torch.Generator().manual_seed(0)
    pred, truth = (torch.randint(0, 4, (2, 24, 32), generator=generator).repeat_interleave(4, -1) for _ in range(2))
    pairs = [torch.stack([classes, numbers(torch.where(instance > 1, instance, 0))], -1)
             for classes, instance in (pred, truth)]
    plain = [torch.stack([classes, torch.where(instance > 1, instance, 0)], -1)
             for classes, instance in (pred, truth)]
    for new, old in zip(match_segments(*pairs), match_segments(*plain)):
        assert new.equals(old)
    isthing = [True, True, False, True]
    assert PanopticQuality(isthing).update(*pairs).compute()['pq'] == PanopticQuality(isthing).update(
        *plain).compute()['pq']


def test_batches_of_masks_that_differ_in_number_are_refused():
    from opentrans.data import MaskNames
    pred = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(OpenTransError, match='differ in shape'): MaskNames(2).update(pred, pred.repeat(3, 1, 1))


@pytest.mark.parametrize('label', [.5, float('nan'), -1])
def test_labels_of_boxes_are_whole_numbers(label):
    from opentrans.data import DetectionAP
    box = [[0, 0, 1, 1]]
    with pytest.raises(OpenTransError, match='labels outside 0..1'):
        DetectionAP(2).update(dict(boxes=box, scores=[1], labels=[label]), dict(boxes=box, labels=[1]))
