"""At which density a linear layer is faster on the sparse engine than on torch: layers of ViT-B and ViT-L, numbers of
tokens as of 224 to 512 pixels, one thread, CPU time of the process, in turns.

    python benchmarks/bench_sparse_linear.py [--out benchmarks/bench_sparse_linear.json] [--seconds 1.5]

A row is one layer, number of tokens and density: `ratio` is torch's shortest call over ours. `border` is the density
at which both are equally fast, by a straight line between the measured ones (in the reciprocal of the ratio). What
is stored already is not measured again.
"""
import argparse, json, os
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
from torch import nn
from opentrans import sparse
from opentrans.files import save_json
from opentrans.sparse import linear

LAYERS = {'ViT-B qkv': (768, 2304), 'ViT-B fc1': (768, 3072), 'ViT-B fc2': (3072, 768),
          'ViT-L fc1': (1024, 4096)}
TOKENS, DENSITIES = (50, 197, 1025), (.1, .3, .45, .6, .8)

def row(name, tokens, density, seconds):
    "One measurement."
    inputs, outputs = LAYERS[name]
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs).eval()
    layer.weight.data *= torch.rand(layer.weight.shape, generator=g) < density
    x, ours = torch.randn(1, tokens, inputs), linear.NativeLinear(layer)
    times = sparse.in_turns(dict(torch=lambda: layer(x), ours=lambda: ours(x)), seconds)
    assert not ours.reasons
    low = times.min()
    return dict(layer=name, tokens=tokens, density=density, torch_ms=low.torch, ours_ms=low.ours,
                ratio=low.torch/low.ours, rounds=len(times))

def border(rows):
    "The density at which torch's time over ours is one."
    density, share = [r['density'] for r in rows], [1/r['ratio'] for r in rows]
    return float(np.interp(1, share, density)) if min(share) < 1 < max(share) else float(max(share) < 1)

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', default='benchmarks/bench_sparse_linear.json')
    parser.add_argument('--seconds', type=float, default=1.5)
    a = parser.parse_args()
    result = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else dict(rows=[], borders={})
    done = {(r['layer'], r['tokens'], r['density']) for r in result['rows']}
    for name in LAYERS:
        for tokens in TOKENS:
            for density in DENSITIES:
                if (name, tokens, density) in done: continue
                result['rows'].append(row(name, tokens, density, a.seconds))
                print(json.dumps(result['rows'][-1]), flush=True)
                save_json(result, a.out)
            own = [r for r in result['rows'] if r['layer'] == name and r['tokens'] == tokens]
            result['borders'][f'{name}, {tokens} tokens'] = border(own)
            save_json(result, a.out)
    print(json.dumps(result['borders'], indent=1))

if __name__ == '__main__': main()
