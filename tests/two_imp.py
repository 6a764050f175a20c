"""What `test_pruning` runs in two processes of accelerate: python two_imp.py OUT prunes. Each process saves its masks
and weights; a run that goes on must find the mask again."""
import sys
import torch
from accelerate import Accelerator
from torch import nn
from killed_imp import net, train
from opentrans.pruning import imp

OPTIONS = dict(density=.5, p=.3, seed=3)

def drift(model, round):
    "No training: weights that differ from process to process."
    weight = model.module[3].weight
    with torch.no_grad(): weight.add_(.01*torch.distributed.get_rank()*torch.randn_like(weight))

def main(out):
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
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

if __name__ == '__main__': main(sys.argv[1])
