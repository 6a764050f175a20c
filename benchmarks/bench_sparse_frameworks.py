"""Whole frameworks on CLIP's RN50 at 512 px: seconds an image, a tenth of the tower's weights, dense torch and the
sparse engine in turns.

    python benchmarks/bench_sparse_frameworks.py [--out benchmarks/bench_sparse_frameworks.json] [--names deeplabv3
    fcclip] [--size 512] [--seconds 60]

Weights are random (time does not depend on them), batch norms as after training; the mask keeps a tenth of each
layer at random places. Both sides compute the same masked model on one thread; the clock is the CPU time of the
process. `error` is the largest difference of the scores as a share of the largest score, `pixels` the share of
pixels of the same class. A framework that is stored already is not measured again.
"""
import argparse, json, os, warnings
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from bench_sparse import processor
from opentrans import sparse
from opentrans.clip import ClipBackbone
from opentrans.files import save_json
from opentrans.frameworks import build
from opentrans.pruning import SparseMask

warnings.simplefilter('ignore')
CLASSES = ('sky', 'road', 'car', 'tree', 'building', 'person', 'water', 'grass')

def framework(name):
    "A framework with a masked tower, in eval mode."
    torch.manual_seed(0)
    clip = ClipBackbone.create('RN50', pretrained=None, output_stride=16 if name == 'deeplabv3' else 32)
    for part in clip.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, .1)
            part.running_var.uniform_(.5, 1.5)
            part.weight.data.uniform_(.5, 1.) # new ResNets begin with zeros, behind which the engine does nothing
    mask = SparseMask.random(clip, dict.fromkeys(SparseMask.ones(clip).names, .1))
    model = build(name, clip, list(CLASSES)).eval()
    mask.apply(model).remove()
    return model

@torch.no_grad()
def measure(name, size, seconds):
    "One row."
    model = framework(name)
    fast = sparse.compile(model)
    images, text = torch.rand(1, 3, size, size), model.text()
    want, got = model(images, text), fast(images, text)
    times = sparse.in_turns(dict(dense=lambda: model(images, text), ours=lambda: fast(images, text)), seconds, most=9)
    tower = sparse.in_turns(dict(dense=lambda: model.backbone(images), ours=lambda: fast.backbone(images)),
                            seconds/3, most=9)
    return dict(framework=name, size=size, dense_s=times.dense.min()/1e3, sparse_s=times.ours.min()/1e3,
                ratio=times.dense.min()/times.ours.min(), tower_dense_s=tower.dense.min()/1e3,
                tower_sparse_s=tower.ours.min()/1e3, tower_ratio=tower.dense.min()/tower.ours.min(),
                rounds=len(times), error=float((got - want).abs().max()/want.abs().max()),
                pixels=float((got.argmax(1) == want.argmax(1)).float().mean()), load=os.getloadavg()[0])

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', default='benchmarks/bench_sparse_frameworks.json')
    parser.add_argument('--names', nargs='+', default=['deeplabv3', 'fcclip'])
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--seconds', type=float, default=60)
    a = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else dict(processor=processor(), rows=[])
    for name in a.names:
        if any(row['framework'] == name and row['size'] == a.size for row in result['rows']): continue
        result['rows'].append(measure(name, a.size, a.seconds))
        print(json.dumps(result['rows'][-1]), flush=True)
        save_json(result, a.out)

if __name__ == '__main__': main()
