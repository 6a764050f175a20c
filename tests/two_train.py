"""What `test_distributed` runs in one process or two: python two_train.py OUT trains, measures, prunes and fails, and
writes what came of it to OUT/rank0.json and OUT/rank1.json."""
import contextlib, hashlib, json, sys
from pathlib import Path
import torch
from torch import nn
from opentrans.core import LayerSelection, OpenTransError
from opentrans.data import ShapesWorld
from opentrans.files import lock_folder
from opentrans.frameworks.contract import tiny_backbone
from opentrans.metrics import PanopticQuality
from opentrans.processes import Processes
from opentrans.pruning import SparseMask, imp
from opentrans.training import Recipe, evaluate, finetune
from resume_elsewhere import World, framework

torch.set_num_threads(1)
# norms see a part of a batch each, so they are held still: the backbone's by this recipe, the head's by `new`
RECIPE = Recipe.tiny().replace(iterations=4, batch_size=4, norm='eval', lr_warmup=0, lr=1e-2)

class Poisoned(World):
    "One of its images is not a number."
    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return dict(sample, image=sample['image']*float('nan')) if i == 5 else sample

def new(world): return framework(world, norms=False)

def train(world, recipe=RECIPE, **options): return finetune(new(world), world, recipe, **options)

def digest(tensors):
    "One word for the bytes of all."
    return hashlib.sha256(b''.join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()

def masked_training(world, folder):
    "A framework of which half the layers are trained below a mask; its losses and weights, and if zeros stayed zeros."
    mask = SparseMask.magnitude(tiny_backbone().tower, .3)
    half = LayerSelection(mask.names[::2], mask.names[1::2], 'every second')
    seg = new(world)
    history = finetune(seg, world, RECIPE, selection=half, mask=mask, checkpoint_dir=folder)
    zeros = [bool((weight[~mask[name]] == 0).all()) for name, weight in mask.weights(seg).items()]
    return seg, dict(loss=history.loss.tolist(), weights=digest(seg.state_dict().values()), zeros=zeros)

def scores(seg):
    "Of 5 images, which two processes share as 3 and 2; of 1, of which one process has none; of the 5, by each alone."
    val = ShapesWorld('val', n=5, size=32)
    shared = evaluate(seg, val, batch_size=2)
    single = evaluate(seg, ShapesWorld('val', n=1, size=32))
    alone = evaluate(seg, val, alone=True)
    return dict(miou=shared['miou'], accuracy=shared['pixel_accuracy'], images=shared['n_images'],
                single=single['miou'], alone=alone['miou'])

def random_segments(generator):
    "A map of 16 x 16 pixels: class and instance of each."
    classes = torch.randint(0, 3, (4, 4), generator=generator)
    instances = torch.randint(0, 2, (4, 4), generator=generator)
    return torch.stack([classes, instances], -1).repeat_interleave(4, 0).repeat_interleave(4, 1)

def panoptic_quality(team):
    "Of five random maps, each of which one process sees; the first is found without a fault."
    quality, generator = PanopticQuality([True, True, False]), torch.Generator().manual_seed(0)
    for i in range(5):
        found, truth = random_segments(generator), random_segments(generator)
        if i % team.n == team.rank: quality.update(found if i else truth, truth)
    if team.n > 1: quality = quality.reduce(team.sum, team.device)
    return quality.compute()['pq']

def mask_of_rounds(team, world):
    """Algorithm 1 with a trainer that wraps the model: each process trains on images of its own, gradients are
    averaged."""
    model = tiny_backbone().tower
    if team.n > 1: model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    def train_round(model, round):
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=.05)
        for step in range(2):
            images = torch.stack([world[(2*round+step+k) % len(world)]['image'] for k in range(2)])
            images = nn.functional.interpolate(images, 64)[team.rank::team.n]
            optimizer.zero_grad()
            (model(images)**2).mean().backward()
            optimizer.step()
    mask,_ = imp(model, train_round, density=.3, p=.3, criterion='magnitude')
    return digest(mask[name] for name in mask.names), mask.density

def train_in_taken(team, world, folder):
    "A run in a folder of which the first process alone knows that it is another's."
    with lock_folder(folder) if team.main else contextlib.nullcontext(): train(world, checkpoint_dir=folder)

def failures(team, world, out):
    "What must end in a sentence, by name."
    poisoned = Poisoned()
    other_mask = SparseMask.random(tiny_backbone().tower, .5, seed=team.rank)
    return dict(
        mask=lambda: train(world, mask=other_mask),
        odd=lambda: train(world, RECIPE.replace(batch_size=3)),
        nan=lambda: train(poisoned, checkpoint_dir=out/'nan', checkpoint_every=1),
        device=lambda: train(world, device='cuda:1'),
        taken=lambda: train_in_taken(team, world, out/'taken'),
        score=lambda: evaluate(new(poisoned), poisoned, batch_size=1))

def sentence(run):
    "The one in which a run ends."
    try: run()
    except OpenTransError as error: return str(error)
    return 'nothing was said'

def main(out):
    team, world = Processes(), World()
    seg, told = masked_training(world, out/'run')
    told.update(rank=team.rank, n=team.n)
    told['parts'] = train(world, RECIPE.replace(iterations=2, accumulate=2)).loss.tolist()
    told.update(scores(seg))
    told['pq'] = panoptic_quality(team)
    told['imp'] = mask_of_rounds(team, world)
    for name, run in failures(team, world, out).items(): told[name] = sentence(run)
    (out/f'rank{team.rank}.json').write_text(json.dumps(told))

if __name__ == '__main__':
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
