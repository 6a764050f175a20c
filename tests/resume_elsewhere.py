"""What `test_distributed` runs in one process or two: python resume_elsewhere.py OUT HALT goes on with the run in
OUT, and leaves it after iteration HALT if that is not 0."""
import json, sys
from pathlib import Path
import torch
from torch import nn
from opentrans.data import ShapesWorld
from opentrans.processes import Processes
from opentrans.training import finetune, Recipe
from opentrans.frameworks import build
from opentrans.frameworks.contract import tiny_backbone

torch.set_num_threads(1)
KINDS = dict(norms=dict(), parts=dict(norm='eval', accumulate=2), half=dict(norm='eval', precision='bf16'))

class World(torch.utils.data.Dataset):
    "Every pixel has a class, so that the mean over processes is the mean over pixels."
    name, ignore = 'world', 255
    def __init__(self):
        self.world = ShapesWorld(n=8, size=32)
        self.vocabulary = self.world.vocabulary
    def __len__(self): return len(self.world)
    def __getitem__(self, i):
        sample = self.world[i]
        return dict(sample, labels=sample['labels'].where(sample['labels'] != 255, 0))

class Halted(Exception): "The run was left on purpose."

def framework(world, norms):
    """DeepLabV3 whose norms learn from all images of a batch, wherever they are; else its head's norms are held
    still."""
    seg = build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small', width=16, loss_stride=1,
                seed=0)
    for m in seg.modules():
        if isinstance(m, nn.BatchNorm2d) and not norms: m.train = lambda mode=True, m=m: nn.Module.train(m, False)
    return seg

def main(out, halt):
    team, world = Processes(), World()
    for kind, changes in KINDS.items():
        recipe = Recipe.tiny().replace(iterations=6, batch_size=8, lr_warmup=0, lr=1e-2,
                                       norm='train').replace(**changes)
        def leave(seg, row):
            if halt and row['iteration'] == halt: raise Halted
        try:
            losses = finetune(framework(world, kind == 'norms'), world, recipe, checkpoint_dir=out/kind,
                              checkpoint_every=halt or 100, callback=leave).loss.tolist()
        except Halted: continue
        if team.main: (out/f'{kind}.json').write_text(json.dumps(losses))

if __name__ == '__main__':
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
