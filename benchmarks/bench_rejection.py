"""SED with and without category early rejection at 847 names: time, and how often the label stays, in one run.

    OMP_NUM_THREADS=1 python benchmarks/bench_rejection.py [--iterations 400] [--images 12] [--size 96] [--names
    847] [--weights sed.safetensors] [--out bench_rejection.json]

A small SED learns the generated world (`ShapesWorld`) on the ConvNeXt that ships with the package. Then it is
asked 847 names: those of the world, and others made of the words that its CLIP knows ("striped red blue star"),
which no image shows.
For each image the ways take turns: none rejected, and 1 to 128 classes kept by each cell. A ratio is the median
of the ratios of each image; times are those of the processor, without the waiting. `tower` is the share of the
time that no rejection can save.
"""
import argparse, itertools, os, time
import numpy as np
import torch
from opentrans.clip import ClipBackbone
from opentrans.data import ShapesWorld, Vocabulary
from opentrans.experiments import hardware
from opentrans.files import load_tensors, save_json, save_tensors
from opentrans.frameworks import build
from opentrans.runtime import seed_everything
from opentrans.training import evaluate, finetune, Recipe

WORDS = dict(pattern=('plain', 'striped', 'dotted'), first=('red', 'blue', 'green', 'yellow', 'purple'),
             second=('red', 'blue', 'green', 'yellow', 'purple'),
             shape=('star', 'square', 'circle', 'triangle', 'box', 'disc', 'wedge', 'paper', 'brick', 'sand',
                    'water', 'grass'))

def names_of(world, count):
    "The names of the world, and others of its words up to `count`."
    names = list(world.vocabulary.names)
    more = [' '.join(words) for words in itertools.product(*WORDS.values())]
    return names + [name for name in more if name not in names][:count-len(names)]

def trained(args):
    "A small SED that has learned the world."
    world = ShapesWorld('train', n=1024, size=64)
    seg = build('sed', ClipBackbone.create('shapes-convnext', pretrained='shapes-convnext'),
                vocabulary=world.vocabulary, preset='small', seed=0)
    if args.weights and os.path.exists(args.weights): seg.load_state_dict(load_tensors(args.weights)[0])
    else:
        finetune(seg, world, Recipe.tiny().replace(iterations=args.iterations))
        if args.weights: save_tensors(seg.state_dict(), args.weights)
    return seg.eval()

def seconds(step):
    began = time.process_time()
    out = step()
    return time.process_time()-began,out

@torch.no_grad()
def measure(seg, world, text, ways, images):
    "Seconds and labels of each way, image by image, in turns."
    times = {w: [] for w in ways}
    labels = {w: [] for w in ways}
    left = {w: [] for w in ways}
    tower = []
    def look(best, x):
        seg.reject = best
        return seg.semantic(x, text)
    look(0, world[0]['image'][None])
    for number in range(images):
        x = world[number]['image'][None]
        tower.append(seconds(lambda: seg.cells(x))[0])
        for best in ways:
            took,found = seconds(lambda: look(best, x))
            times[best].append(took)
            labels[best].append(found)
            if best: left[best].append(seg.left[0])
    return {w: np.array(t) for w,t in times.items()},labels,left,np.array(tower)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    for name,default in dict(iterations=400, images=12, size=96, names=847).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--weights')
    p.add_argument('--out')
    args = p.parse_args()
    seed_everything(0)
    seg = trained(args)
    world = ShapesWorld('val', n=max(args.images, 48), size=args.size)
    miou = evaluate(seg, world, limit=48)['miou']
    names = names_of(world, args.names)
    text = seg.text(Vocabulary(names))
    ways = (0, 1, 4, 8, 32, 64, 128)
    times,labels,left,tower = measure(seg, world, text, ways, args.images)
    rows = []
    for best in ways:
        same = torch.stack([(a == b).float().mean() for a,b in zip(labels[best], labels[0])])
        counts = np.mean(left[best], 0).round(1).tolist() if best else [len(names)]*3
        rows.append(dict(kept_by_each_cell=best or 'all', names_after_each_step=counts,
                         seconds=float(np.median(times[best])),
                         times_faster=float(np.median(times[0]/times[best])), same_label=float(same.mean()),
                         worst_image=float(same.min())))
        print(rows[-1])
    run = dict(hardware(), threads=torch.get_num_threads(),
               command=f"python benchmarks/bench_rejection.py --iterations {args.iterations} --images "
                       f"{args.images} --size {args.size} --names {args.names}")
    result = dict(what='SED with and without category early rejection', run=run, names=len(names),
                  images=args.images, size=args.size, miou_of_the_world=miou,
                  share_of_the_tower=float(np.median(tower/times[0])), rows=rows)
    if args.out: save_json(result, args.out)

if __name__ == '__main__': main()
