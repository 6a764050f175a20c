"""Which mask is faster at equal mIoU: one found by magnitude, or by magnitude at the price of each weight's time?

python benchmarks/clock_masks.py                     three seeds on two processes (half an hour of two idle cores)
                                 --seeds 5 --workers 1 --scale demo

Algorithm 1 goes down twice, from the same small CLIP and with the same data: once with all weights alike, once with
`price='clock'`. At some of its rounds the mask goes onto the original weights and is fine-tuned with DeepLabV3 on
the generated scenes; beside the mIoU stands what the sparse engine takes for the tower's 224-pixel image, on one
thread, all masks of a seed in turns. Writes clock_masks.json.
"""
import argparse
import concurrent.futures
import multiprocessing
import os
from pathlib import Path
import torch
from opentrans.experiments.arms import _trainer, build_framework
from opentrans.experiments.scale import get_scale, hardware, open_clip_of, world_of
from opentrans.files import save_json
from opentrans.pruning import clock_prices, imp, prunable, SparseMask
from opentrans.sparse.speed import in_turns
from opentrans.training import evaluate, finetune

HERE = Path(__file__).resolve().parent
DROP = .3 # share of the remaining weights that a round drops
JUDGED = (4, 6, 8, 10) # rounds whose mask is fine-tuned: densities .24, .12, .058, .028

def masks_of(clip, train, price, seed):
    "The masks of Algorithm 1 after some of its rounds, by the number of the round."
    found = {}
    tower = clip.fresh_copy()
    def note(number):
        if number in JUDGED:
            found[number] = SparseMask({layer.name: layer.weight.detach() != 0 for layer in prunable(tower)})
    def train_and_note(model, number):
        note(number)
        return train(model, number)
    imp(tower, train_and_note, density=(1-DROP)**JUDGED[-1], p=DROP, price=price, seed=seed)
    note(JUDGED[-1])
    return found

def tuned_miou(mask, scale, world, seed):
    "mIoU in percent of DeepLabV3 after fine-tuning under a mask, over base and novel names."
    clip = open_clip_of(scale)
    seg = build_framework('', clip, world['train'].vocabulary, scale, seed)
    recipe = scale.recipe(sum(scale.steps()), 'poly', seed, after=0)
    finetune(seg, world['train'], recipe, mask=mask)
    groups = evaluate(seg, world['val'])['groups']
    return {name: 100*groups[name] for name in ('base', 'novel')}

def milliseconds(clip, masks, seconds=20.):
    "Of the compiled tower under each mask, and dense on torch, in turns: the least."
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    towers = {name: mask.compile(clip.fresh_copy()) for name,mask in masks.items()}
    towers['dense'] = clip
    def call(tower): return lambda: tower(image)
    with torch.no_grad(): times = in_turns({name: call(tower) for name,tower in towers.items()}, seconds)
    return times.min().to_dict()

def judge_seed(seed, name, prices):
    "Rows of one seed."
    torch.set_num_threads(1)
    scale = get_scale(name)
    clip,world = open_clip_of(scale),world_of(scale, seed)
    train = _trainer(clip, world['train'], scale, iterations=scale.imp_iters)
    masks = {}
    for kind,price in dict(alike=None, clock=prices).items():
        masks |= {(kind, number): mask for number,mask in masks_of(clip, train, price, seed).items()}
    times = milliseconds(clip, masks)
    rows = [dict(seed=seed, price='dense', density=1., ms=times['dense'])]
    for (kind,number),mask in masks.items():
        rows.append(dict(seed=seed, price=kind, density=mask.density, ms=times[kind, number],
                         **tuned_miou(mask, scale, world, seed)))
        print(rows[-1], flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--scale', default='demo')
    parser.add_argument('--out', default=HERE/'clock_masks.json', type=Path)
    told = parser.parse_args()
    os.environ['OPENTRANS_PROGRESS'] = '0'
    torch.set_num_threads(1)
    prices = clock_prices(open_clip_of(get_scale(told.scale))) # the same for all seeds
    spawned = multiprocessing.get_context('spawn')
    given = [range(told.seeds), [told.scale]*told.seeds, [prices]*told.seeds]
    with concurrent.futures.ProcessPoolExecutor(told.workers, spawned) as pool: parts = [*pool.map(judge_seed, *given)]
    rows = [row for part in parts for row in part]
    save_json(dict(hardware=hardware(), scale=told.scale, prices=prices, rows=rows), told.out)

if __name__ == '__main__': main()
