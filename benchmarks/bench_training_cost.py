"""What freezing and masking promise, and what the clock and the memory say: one training step, full, frozen,
masked, both.

    OMP_NUM_THREADS=1 python benchmarks/bench_training_cost.py [--model rn50] [--size 128] [--batch 4] [--reps 3]
    [--device cpu] [--out training.json]

FLOPs by the paper's rule (supplement 6.2), by the exact rule, and the peak memory by `training_memory`, each as
a share of full training; beside them the measured
wall-clock and peak of a real step (forward, backward, AdamW) of the same tower under the same mask and
selection. The four take turns; a share is the median of the shares of each turn.
A mask is zeros among other numbers: dense kernels multiply them too. A frozen layer still passes a gradient on.
So the clock gives less than the FLOPs promise, and this file says how much.
"""
import argparse, contextlib, copy, os, platform, time
import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from opentrans.core import LayerSelection, layers
from opentrans.cost import cost, peak_memory, training_flops, training_memory
from opentrans.pruning import SparseMask

os.environ.update(OPENTRANS_PROGRESS='0')
MODELS = dict(rn50=dict(layers=[3, 4, 6, 3], width=64), small=dict(layers=[1, 1, 1, 1], width=16))

class Net(nn.Module):
    "CLIP's trunk, pooled: the part of a framework that masks and selections act on."
    def __init__(self, layers, width):
        super().__init__()
        self.visual = ModifiedResNet(layers, 64, 4, image_size=64, width=width)
        self.visual.attnpool = nn.Identity()
    @property
    def tower(self): return self.visual
    def forward(self, x): return self.visual(x).mean((2, 3))

def half_by_macs(c, convs):
    """The 3x3 convolutions first, as the small alphas of the paper's runs have it: half of the layers, most of the
    multiply-accumulates."""
    order = sorted(convs, key=lambda n: -c.by_layer.macs[n])
    k = len(convs)//2
    return LayerSelection([n for n in convs if n in order[k:]], [n for n in convs if n in order[:k]],
                          'the heavier half')

def setup(net, mask, selection, device):
    "A step function of its own model, optimizer and data."
    net = copy.deepcopy(net).to(device).train()
    stack = contextlib.ExitStack()
    if selection: stack.enter_context(selection.apply(net))
    if mask: stack.enter_context(mask.apply(net))
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, 1e-4)
    def step(x):
        opt.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        opt.step()
        if x.is_cuda: torch.cuda.synchronize()
    return net,step,stack

def main(args):
    torch.manual_seed(0)
    net = Net(**MODELS[args.model])
    size = (args.batch, 3, args.size, args.size)
    c = cost(net, size[1:])
    convs = [layer.name for layer in layers(net) if layer.kind == 'conv']
    mask,sel = SparseMask.magnitude(net.tower, .1),half_by_macs(c, convs)
    ways = dict(full=(None, None), frozen=(None, sel), masked=(mask, None), both=(mask, sel))
    x = torch.randn(size, device=args.device)
    made = {k: setup(net, *w, args.device) for k,w in ways.items()}
    flops = {k: {r: training_flops(c, 1, args.batch, mask=w[0], selection=w[1], rule=r)
                 for r in ('paper', 'exact')} for k,w in ways.items()}
    states = {k: training_memory(m, size, optimizer='adamw') for k,(m,_,_) in made.items()}
    # warm-up, and the optimizer states exist
    for _,step,_ in made.values(): step(x)
    seconds = {k: [] for k in made}
    for _ in range(args.reps):
        for k,(_,step,_) in made.items():
            t = time.perf_counter()
            step(x)
            seconds[k].append(time.perf_counter()-t)
    fixed = {k: int(s.weights + s.optimizer + sum(b.numel()*b.element_size() for b in net.buffers()))
             for k,s in states.items()}
    peak = {k: peak_memory(lambda: step(x), args.device) + fixed[k] for k,(_,step,_) in made.items()}
    where = (torch.cuda.get_device_name() if torch.device(args.device).type == 'cuda'
             else f'{platform.machine()}, {torch.get_num_threads()} thread(s)')
    print(
        f"{args.model} at {'x'.join(map(str, size))}, AdamW, {where}, torch {torch.__version__}; {len(sel.freeze)} "
        f"of {len(convs)} layers rest, density {mask.density:.3f}\n")
    print('| step | FLOPs, paper | exact | seconds | MiB estimated | MiB measured |\n|---|--:|--:|--:|--:|--:|')
    rows = {}
    for k in made:
        share = float(np.median(np.array(seconds[k])/np.array(seconds['full'])))
        rows[k] = dict(paper=flops[k]['paper']/flops['full']['paper'],
                       exact=flops[k]['exact']/flops['full']['exact'], seconds=min(seconds[k]), share=share,
                       estimated=states[k].peak/2**20, measured=peak[k]/2**20)
        r = rows[k]
        print(
            f"| {k} | {r['paper']:.2f} | {r['exact']:.2f} | {r['seconds']:.3f} ({share:.2f}) | "
            f"{r['estimated']:.0f} | {r['measured']:.0f} |")
    for k in ('frozen', 'masked', 'both'):
        gap = rows[k]['share'] - rows[k]['paper']
        print(f"{k}: FLOPs promise {1-rows[k]['paper']:.0%} less, the clock gives {1-rows[k]['share']:.0%}"
              + ('. The promise is not kept by dense kernels.' if gap > .1 else '.'))
    if args.out:
        from opentrans.files import save_json
        save_json(dict(rows=rows, args=vars(args)), args.out)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', choices=list(MODELS), default='rn50')
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--batch', type=int, default=4)
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--device', default='cpu')
    p.add_argument('--out')
    main(p.parse_args())
