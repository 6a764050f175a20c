"""What `test_runs` runs: python killed_distill.py OUT MODE COUNT prunes with distillation in COUNT processes that share
a batch: without a break, with three kills, and with what the trainer remembers lost at the last kill. The first two
must end alike; it prints whether the third does."""
import os, shutil, signal, sys, time
import torch
import torch.distributed as dist
from children import exit_code, fork
from opentrans.distill import DistillTrainer
from opentrans.pruning import imp
from test_distill import Halves, tiny_clip
from test_runs import rounds

torch.set_num_threads(1)

class Sizes(Halves):
    "Images of several sizes: an embedding depends on the images that it was computed with."
    def __getitem__(self, i):
        height, width = 32 + 8*(i%3), 32 + 8*(i%4)
        sample = super().__getitem__(i)
        cut = {key: sample[key][..., :height, 32-i:32-i+width] for key in ('image', 'labels', 'regions')}
        return dict(sample, **cut)

def join(store, rank, count):
    "Make this process one of a team, as a launcher tells it."
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count),
                      MASTER_ADDR='localhost', MASTER_PORT='0', ACCELERATE_USE_CPU='true')
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=count)

def gone(pid):
    "Whether a child has ended; its exit code can still be asked."
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def same(a, b):
    "To the last bit."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b

class Runs:
    "Runs in a number of processes, by a teacher that embeds regions in some mode."
    def __init__(self, mode, count):
        self.mode = mode
        self.count = count
        self.clip = tiny_clip(width=4)

    def prune(self, folder, rank, cold=False):
        "The work of one process, which writes what it ends with; a cold trainer forgets what it is given back."
        if self.count > 1: join(f'{folder}.store', rank, self.count)
        trainer = DistillTrainer(self.clip, Sizes(), iterations=16, lr=3e-3, batch_size=2, max_regions=3,
                                 teacher_mode=self.mode)
        if cold: trainer.load_state_dict = lambda state: None
        net = self.clip.fresh_copy()
        mask, history = imp(net, trainer, density=.5, p=.3, checkpoint_dir=folder, checkpoint_every=6)
        rows = history.drop(columns='seconds').to_dict('list')
        ended = dict(mask=dict(mask.items()), net=net.state_dict(), log=trainer.log, history=rows)
        torch.save(ended, f'{folder}.{rank}.pt')

    def start(self, folder, **options):
        "The processes of a run, begun together."
        if os.path.exists(f'{folder}.store'): os.remove(f'{folder}.store')
        return [fork(self.prune, folder, rank, **options) for rank in range(self.count)]

    def whole(self, folder, **options):
        "What each process of a run that nobody kills ends with."
        codes = [exit_code(pid) for pid in self.start(folder, **options)]
        assert codes == [0]*self.count, codes
        return [torch.load(f'{folder}.{rank}.pt', weights_only=True) for rank in range(self.count)]

    def killed(self, folder, after, within=False):
        """Kills a run once so many rounds are whole, or once there is a checkpoint within the next; gives the number of
        whole rounds."""
        pids = self.start(folder)
        def seen(): return rounds(folder) >= after and (os.path.exists(f'{folder}/round.safetensors') or not within)
        while not seen() and not gone(pids[0]): time.sleep(.002)
        for pid in pids: os.kill(pid, signal.SIGKILL)
        codes = [exit_code(pid) for pid in pids]
        assert -9 in codes and {*codes} <= {-9, 9}, codes   # one may see the other go before it is gone itself
        return rounds(folder)

def forget(folder):
    "Take away what the trainer remembers, and the checkpoint within a round."
    assert os.path.exists(f'{folder}/round.safetensors') and os.path.exists(f'{folder}/teacher-00000.safetensors')
    for name in os.listdir(folder):
        if name.startswith(('round', 'teacher')): os.remove(f'{folder}/{name}')

def main(out, mode, count):
    runs = Runs(mode, int(count))
    whole = runs.whole(f'{out}/whole')
    assert runs.killed(f'{out}/cut', 0) == 0
    assert runs.killed(f'{out}/cut', 0, within=True) == 0
    assert runs.killed(f'{out}/cut', 1, within=True) == 1
    shutil.copytree(f'{out}/cut', f'{out}/cold')
    forget(f'{out}/cold')
    cut, cold = runs.whole(f'{out}/cut'), runs.whole(f'{out}/cold', cold=True)
    assert not os.path.exists(f'{out}/cut/round.safetensors')
    for rank, (one, other) in enumerate(zip(whole, cut)):
        assert [key for key in one if not same(one[key], other[key])] == [], rank
    assert same(whole[0]['net'], whole[-1]['net']) and same(whole[0]['mask'], whole[-1]['mask'])
    print('without its memory:', same(whole[0]['net'], cold[0]['net']))

if __name__ == '__main__': main(*sys.argv[1:])
