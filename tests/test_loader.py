"""One loader for distillation and fine-tuning: the batches that each of them had from a loader of its own, to the
bit. The digests were taken from those."""
import hashlib
import pytest
import torch
from opentrans.data import ShapesWorld
from opentrans.data.batches import ImageBatches, random_window, sample_batches
from opentrans.errors import FormatError
from opentrans.distill import DistillTrainer
from opentrans.distill.teaching import _Stream
from opentrans.frameworks.contract import tiny_backbone
from opentrans.training import Recipe, batches

DISTILLED = {None: '83209c5ce6be6682', 48: '380dad4fbaad42bb'}
FINE_TUNED = [(dict(crop=0, flip=0.), '6055710f83c441f4'),
              (dict(crop=48, flip=.5, scale=(.5, 2.)), '253c9d3fd8a08ee3')]

def digest(things):
    seen = hashlib.sha256()
    for thing in things:
        is_tensor = isinstance(thing, torch.Tensor)
        seen.update(thing.contiguous().numpy().tobytes() if is_tensor else repr(thing).encode())
    return seen.hexdigest()[:16]

class Broken(torch.utils.data.Dataset):
    "Pictures that cannot be read."
    def __len__(self): return 2
    def __getitem__(self, i):
        try: raise KeyError(i)
        except KeyError: raise FormatError("The file 'a.png' is cut short: 3 of 9 bytes.\nGet it again.") from None

@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_of_a_worker_is_its_own_sentence(workers):
    "Without the traceback that torch puts around it; the kind of error stays."
    loader = torch.utils.data.DataLoader(Broken(), num_workers=workers)
    with pytest.raises(FormatError) as told: next(iter(loader))
    assert str(told.value) == "The file 'a.png' is cut short: 3 of 9 bytes.\nGet it again."

def world(): return ShapesWorld('train', n=12, size=64)

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('crop', DISTILLED)
def test_distillation_has_its_old_batches(crop, workers):
    torch.manual_seed(7)
    options = dict(batch_size=5, crop=crop, max_regions=9, seed=3, workers=workers)
    stream = _Stream(DistillTrainer(tiny_backbone(), world(), **options), 11)
    taken = [next(stream) for _ in range(4)]
    things = [part for b in taken for part in (b['keys'], b['classes'], b['owner'], *b['regions'],
                                               (b['images']*255).round().byte())]
    assert digest(things) == DISTILLED[crop]
    assert int(torch.randint(10**6, ())) == 725721, "torch's own generator stands where it stood"

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('options,expected', FINE_TUNED)
def test_fine_tuning_has_its_old_batches(options, expected, workers):
    torch.manual_seed(7)
    taken = list(batches(world(), Recipe(iterations=4, batch_size=5, seed=5, workers=workers, **options)))
    things = [part for b in taken for part in (b['ids'], b['labels'], *[c.tolist() for c in b['region_classes']],
                                               *b['regions'])]
    assert digest(things) == expected
    assert int(torch.randint(10**6, ())) == 741615, 'nothing is drawn from torch\'s own generator'

def test_an_order_is_read_as_it_stands_and_no_further():
    "An order may have no end; of the samples only those are read that are asked for."
    asked = []
    class Asked:
        def __getitem__(self, item):
            asked.append(item)
            return item
    def endless():
        i = 0
        while True:
            yield [i, i+1]
            i += 2
    loaded = sample_batches(Asked(), endless())
    assert [next(loaded), next(loaded)] == [[0, 1], [2, 3]] and asked == [0, 1, 2, 3]

@pytest.mark.parametrize('size', [(64, 64), (64, 20), (20, 20), (32, 33)])
def test_a_window_lies_inside_the_image(size):
    draws = torch.Generator().manual_seed(0)
    seen = [random_window(size, 32, draws) for _ in range(200)]
    for place,n in zip(range(2), size):
        starts = {window[place].start for window in seen}
        assert min(starts) == 0 and max(starts) == max(n-32, 0)
        assert all(window[place].stop-window[place].start == 32 for window in seen)

def test_images_to_look_at_have_their_old_windows():
    "The draws of `ImageBatches` are those of `random_window`, with a generator for each image."
    images = ImageBatches(world(), 3, crop=40, seed=2)
    [batch] = images
    for image,number in zip(batch, images.numbers):
        draws = torch.Generator().manual_seed(2*100_003+number)
        y,x = (int(torch.randint(64-40+1, (), generator=draws)) for _ in range(2))
        assert torch.equal(image, world()[number]['image'][:, y:y+40, x:x+40])
