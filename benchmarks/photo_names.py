"""What does a mask leave of the open vocabulary of photo-lite0? Zero-shot mIoU on MSRC, round by round of Algorithm 1,
without a head and without fine-tuning.

python benchmarks/photo_names.py ROOT                five seeds on two processes (half an hour of a core)
                                 --seeds 3 --workers 1 --rounds 6

ROOT holds msrc. Algorithm 1 sees the training photographs and the 15 base names, as in the studies at the scale
`photo`. After each round its mask is judged on CLIP's original weights and on those that the round left, beside
one-shot magnitude and a random mask of the same density on the original weights. Writes photo_names.json.
"""
import argparse, concurrent.futures, copy, multiprocessing, os
from pathlib import Path
import torch
from opentrans.data import SemanticIoU
from opentrans.experiments.arms import _trainer
from opentrans.experiments.scale import get_scale, hardware, open_clip_of, world_of
from opentrans.files import save_json
from opentrans.frameworks.contract import resize
from opentrans.pruning import imp, prunable, SparseMask

HERE = Path(__file__).resolve().parent

@torch.no_grad()
def zero_shot(tower, text, data):
    "mIoU in percent over base and over novel names, of the nearest name of each pixel."
    metric = SemanticIoU(len(data.vocabulary), ignore=data.ignore)
    for i in range(len(data)):
        sample = data[i]
        near = torch.einsum('bdhw,kd->bkhw', tower.eval().dense_embeddings(sample['image'][None]), text)
        metric.update(resize(near, sample['labels'].shape).argmax(1)[0], sample['labels'])
    return {group: 100*share for group,share in metric.compute(data.groups)['groups'].items()}

def rounds_of(clip, train, scale, rounds, seed):
    "Algorithm 1 for some rounds: (mask, tower) after each."
    found = []
    tower = clip.fresh_copy()
    def note():
        mask = SparseMask({layer.name: layer.weight.detach() != 0 for layer in prunable(tower)})
        found.append((mask, copy.deepcopy(tower.visual.state_dict())))
    def train_and_note(model, number):
        if number: note()
        return train(model, number)
    imp(tower, train_and_note, density=(1-scale.p)**rounds, p=scale.p, seed=seed)
    note()
    return found

def judge_seed(seed, rounds):
    "Rows of one seed."
    torch.set_num_threads(1)
    scale = get_scale('photo')
    clip, world = open_clip_of(scale), world_of(scale, seed)
    data = world['val']
    text = clip.encode_text(data.vocabulary)
    train = _trainer(clip, world['train'], scale, iterations=scale.imp_iters)
    rows = [dict(seed=seed, mask='dense', density=1., **zero_shot(clip, text, data))]
    def told(name, mask, state=None):
        tower = clip.fresh_copy()
        if state is not None: tower.visual.load_state_dict(state)
        mask.apply(tower).remove()
        rows.append(dict(seed=seed, mask=name, density=mask.density, **zero_shot(tower, text, data)))
        print(rows[-1], flush=True)
    for mask, state in rounds_of(clip, train, scale, rounds, seed):
        told('distilled', mask)
        told('distilled, and its weights', mask, state)
        told('magnitude', SparseMask.magnitude(clip, mask.density))
        told('random', SparseMask.random(clip, mask.density, seed=seed))
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder with msrc')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--out', default=HERE/'photo_names.json', type=Path)
    told = parser.parse_args()
    os.environ.update(DETECTRON2_DATASETS=told.root, OPENTRANS_PROGRESS='0')
    spawned = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(told.workers, spawned) as pool:
        parts = [*pool.map(judge_seed, range(told.seeds), [told.rounds]*told.seeds)]
    save_json(dict(hardware=hardware(), rows=[row for part in parts for row in part]), told.out)

if __name__ == '__main__': main()
