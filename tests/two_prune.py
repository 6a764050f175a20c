"""What `test_distributed` runs in one process or two: python two_prune.py OUT finds masks by Algorithm 1 with
distillation. Each process writes what it found to OUT/CASE.RANK.pt, and what it was told to OUT/rankRANK.json."""
import json, sys
from pathlib import Path
import torch
from opentrans.core import OpenTransError
from opentrans.distill import DistillTrainer
from opentrans.frameworks import build
from opentrans.processes import Processes
from opentrans.pruning import imp
from test_distill import Halves, tiny_clip

torch.set_num_threads(1)

def squares(student, teacher, text): return (student-teacher).square().sum()
def not_a_number(student, teacher, text): return student.sum()*torch.nan

CASES = dict(
    frozen=dict(batch_norm='frozen'),
    norms=dict(batch_norm='train'),
    image=dict(batch_norm='frozen', pairs='image', loss='vgkd', optimizer='sgd', clip_grad=1.),
    windows=dict(batch_norm='frozen', crop=48, max_regions=5, workers=1),
    own=dict(batch_norm='frozen', teacher_mode='attention', loss=squares))

class Sizes(Halves):
    "Images of several sizes, some of which have one region, and one of which has none that is large enough."
    def __init__(self): super().__init__(8)
    def __getitem__(self, i):
        height, width = 64 - 8*(i%2), 96 - 8*(i%3)
        sample = super().__getitem__(i)
        for key in ('image', 'labels', 'regions'): sample[key] = sample[key][..., :height, :width]
        if i < 3: sample.update(regions=sample['regions'][:1], region_classes=sample['region_classes'][:1])
        if i == 5: sample.update(regions=torch.zeros_like(sample['regions']))
        return sample

def remembered(trainer):
    "What the teacher has told: keys in memory, or how many on the disk."
    return sorted(map(list, trainer._cache)) if trainer._store is None else len(trainer._store.keys)

def pruned(clip, options, rank, folder):
    "One case: writes mask and weights; gives losses, and what is remembered of the teacher."
    net = clip.fresh_copy()
    trainer = DistillTrainer(clip, Sizes(), **{**dict(iterations=5, lr=1e-3, batch_size=4), **options})
    mask, history = imp(net, trainer, density=.5, p=.3, checkpoint_dir=folder)
    torch.save(dict(mask=dict(mask.items()), net=net.state_dict()), f'{folder}.{rank}.pt')
    return dict(loss=history.loss.tolist(), cached=remembered(trainer))

def beside_a_framework(clip):
    "Losses where a framework's own loss is a part."
    seg = build('deeplabv3', clip.fresh_copy(), vocabulary=['left', 'right', 'top'], preset='small', seed=0)
    trainer = DistillTrainer(seg, Sizes(), iterations=2, batch_size=4, segmentation=1.)
    _, history = imp(seg, trainer, density=.7, p=.3)
    return dict(loss=history.loss.tolist())

def refused(clip, options):
    "The sentence in which a run ends; None if it does not."
    try:
        trainer = DistillTrainer(clip, Sizes(), **{**dict(iterations=2, batch_size=4), **options})
        imp(clip.fresh_copy(), trainer, density=.7, p=.3)
    except OpenTransError as error: return str(error)
    return None

def main(out):
    team, clip = Processes(), tiny_clip()
    told = {name: pruned(clip, options, team.rank, out/name) for name, options in CASES.items()}
    told['own loss'] = beside_a_framework(clip)
    failures = dict(odd=dict(batch_size=3), other=dict(lr=1e-3*(1+team.rank)), nan=dict(loss=not_a_number))
    for name, options in failures.items():
        if words := refused(clip, options): told[name] = words
    (out/f'rank{team.rank}.json').write_text(json.dumps(told))

if __name__ == '__main__':
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
