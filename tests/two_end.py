"""What `test_runs` runs: python two_end.py OUT WHAT prunes in two processes that must end together, since one of them
is killed (`lost`) or diverges (`nan`), or the folder is taken (`locked`). Each prints its sentence; then come both exit
codes, and the number of rounds that are whole."""
import os, signal, sys
import torch
import torch.distributed as dist
from children import exit_code, fork
from opentrans.core import OpenTransError
from opentrans.files import lock_folder
from opentrans.pruning import imp
from test_runs import KW, noise, rounds, small

torch.set_num_threads(1)

def prune(out, what, rank):
    "The work of one process, and its exit code. The second one has a fault in its second round."
    dist.init_process_group('gloo', init_method=f'file://{out}/store', rank=rank, world_size=2)
    def train(model, round):
        faulty = rank == 1 and round == 1
        if faulty and what == 'lost': os.kill(os.getpid(), signal.SIGKILL)
        if faulty and what == 'nan':
            with torch.no_grad(): model[0][1].bias.fill_(float('nan'))
        return noise(model, round)
    try: imp(small(), train, checkpoint_dir=f'{out}/run', **KW)
    except OpenTransError as error:
        print(f'{rank}: {error}\n', end='', flush=True)     # in one piece
        return error.exit_code
    return 0

def both(out, what):
    "The exit codes of both processes."
    return [exit_code(pid) for pid in [fork(prune, out, what, rank) for rank in (0, 1)]]

def main(out, what):
    if what == 'locked':
        with lock_folder(f'{out}/run'): print(both(out, what))
    else: print(both(out, what), rounds(f'{out}/run'))

if __name__ == '__main__': main(*sys.argv[1:])
