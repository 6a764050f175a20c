"""What `test_pruning` runs: python two_imp.py OUT PORT prunes in two processes of accelerate. Masks and weights must be
the same in both, also when the weights of one drift, and a run that goes on must find the mask again."""
import os, sys
import torch
from accelerate import Accelerator
from torch import nn
from children import exit_code, fork
from killed_imp import net, train
from opentrans.pruning import SparseMask, imp

OPTIONS = dict(density=.5, p=.3, seed=3)

def drift(model, round):
    "No training: weights that differ from process to process."
    weight = model.module[3].weight
    with torch.no_grad(): weight.add_(.01*torch.distributed.get_rank()*torch.randn_like(weight))

def prune(out, port, rank):
    "The work of one process."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
                      ACCELERATE_USE_CPU='true')
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    mask,_ = imp(model, train, checkpoint_dir=out, **OPTIONS)
    mask.save(f'{out}/trained{rank}.safetensors')
    torch.save(model.module.state_dict(), f'{out}/weights{rank}.pth')
    accelerator.wait_for_everyone()
    again,_ = imp(accelerator.prepare(net()), train, checkpoint_dir=out, **OPTIONS)
    assert again == mask
    drifted,_ = imp(accelerator.prepare(net()), drift, **OPTIONS)
    drifted.save(f'{out}/drifted{rank}.safetensors')
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()

def main(out, port):
    both = [fork(prune, out, port, rank) for rank in (0, 1)]
    assert [exit_code(pid) for pid in both] == [0, 0]
    for name in ('trained', 'drifted'):
        first, second = (SparseMask.load(f'{out}/{name}{rank}.safetensors') for rank in (0, 1))
        assert first == second, name
    first, second = (torch.load(f'{out}/weights{rank}.pth', weights_only=True) for rank in (0, 1))
    mask = SparseMask.load(f'{out}/trained0.safetensors')
    assert all(torch.equal(first[name], second[name]) and (first[name][~mask[name]] == 0).all() for name in mask.names)

if __name__ == '__main__': main(*sys.argv[1:])
