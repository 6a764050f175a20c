"Masks of whole heads and units: what is cut changes nothing, and is gone."
import copy, warnings
import pytest
import torch
from torch import nn
from opentrans.errors import OpenTransError
from opentrans.pruning import FewerHeads, imp, slim_model, SparseMask
from opentrans.vit.peft import add_lora
from fake_cuda import pretended_cuda, values_of
from test_pruning import tiny_vit
from test_sparse import far, lively, small_net

pytestmark = pytest.mark.usefixtures('one_thread')

def timm_vit(**kwargs):
    from timm.models.vision_transformer import VisionTransformer
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2,
                             num_classes=12, **kwargs).eval()

def weights(model): return sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize('make', [tiny_vit, timm_vit, lambda: timm_vit(qk_norm=True), lambda: timm_vit(qkv_bias=False)])
@torch.no_grad()
def test_fewer_heads_the_same_outputs(make):
    net, x = make(), torch.randn(2, 3, 16, 16)
    for part in net.modules():
        for bias in ('bias', 'in_proj_bias'):
            if isinstance(getattr(part, bias, None), nn.Parameter): getattr(part, bias).normal_()
    mask = SparseMask.heads(net, .5)
    small = mask.slim(net)
    mask.apply(net).remove()
    assert far(small(x), net(x)) < 1e-5 and weights(small) < weights(net)

@torch.no_grad()
def test_a_head_whose_values_are_gone_is_a_constant():
    net, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    for block in net.transformer.resblocks:
        block.attn.in_proj_bias.normal_()
        block.attn.in_proj_weight[48:60] = 0
    small = SparseMask.ones(net).slim(net)
    assert all(isinstance(block.attn, FewerHeads) and block.attn.num_heads == 1
               for block in small.transformer.resblocks) and far(small(x), net(x)) < 1e-5

@torch.no_grad()
def test_masks_of_attention_are_those_of_torch():
    "Of (queries, keys), one for each head, numbers and truth values, either order of the axes."
    for first in (True, False):
        whole = nn.MultiheadAttention(12, 3, batch_first=first).eval()
        whole.out_proj.weight[:, :4] = 0
        rows = torch.arange(12) >= 4
        few, x = FewerHeads(whole, rows), torch.randn(2, 5, 12) if first else torch.randn(5, 2, 12)
        numbers = torch.randn(2, 3, 5, 5)
        for mask in (None, numbers[0, 0], numbers[0, 0] > 1):
            assert far(few(x, x, x, attn_mask=mask)[0], whole(x, x, x, attn_mask=mask, need_weights=False)[0]) < 1e-5
        want = whole(x, x, x, attn_mask=numbers.flatten(0, 1), need_weights=False)[0]
        assert far(few(x, x, x, attn_mask=numbers[:, 1:].flatten(0, 1))[0], want) < 1e-5
        with pytest.raises(OpenTransError, match='own sequence'): few(x, x + 1, x)

@torch.no_grad()
def test_a_clip_backbone_with_fewer_heads():
    from opentrans.clip import ClipBackbone
    from opentrans.frameworks import build
    clip = ClipBackbone.create('ViT-B-32', pretrained=None).eval()
    mask = SparseMask.heads(clip, .25)
    small = mask.slim(clip)
    mask.apply(clip).remove()
    images = torch.rand(1, 3, 64, 96)
    assert far(small.dense_embeddings(images), clip.dense_embeddings(images)) < 1e-4
    regions = [torch.zeros(2, 64, 96).index_fill_(2, torch.arange(40), 1)]
    assert far(small.region_embeddings(images, regions), clip.region_embeddings(images, regions)) < 1e-4
    model = build('training_free', clip, ['cat', 'dog'])
    assert mask.slim(model)(images, model.text()).shape == model(images, model.text()).shape

def test_rounds_remove_whole_units():
    "All but the units at the border go whole, and what is cut is what the mask removed."
    for net in (small_net(True), tiny_vit()):
        before = weights(net)
        mask, _ = imp(net, lambda model: None, density=.5, p=.3, criterion='units')
        assert mask.kept == round(.5*mask.total)
        small = mask.slim(net)
        x = torch.randn(1, 3, *([16, 16] if hasattr(net, 'transformer') else [32, 32]))
        with torch.no_grad(): assert far(small(x), net(x)) < 1e-5
        assert weights(small) < .75*before
    with pytest.raises(OpenTransError, match='no units'):
        imp(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), lambda model: None, density=.5, p=.3, criterion='units')

def test_errors_say_what_to_do():
    with pytest.raises(OpenTransError, match='share'): SparseMask.heads(tiny_vit(), 0.)
    with pytest.raises(OpenTransError, match='no attention'): SparseMask.heads(small_net(True), .5)
    odd = copy.deepcopy(tiny_vit())
    assert SparseMask.heads(odd, 1.).density == 1

def dead_bottlenecks():
    "Bottlenecks in which channels without weights are constants that a layer of one pixel reads."
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.conv3, self.relu = nn.Conv2d(6, 8, 1, bias=False), nn.ReLU()
        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return x + self.conv3(self.relu(self.bn2(self.conv2(y))))
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck()), 0).eval()
    net[1].conv2.weight[:3] = 0
    net[1].bn2.bias[:3] = .7
    return net

@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-9), (torch.bfloat16, .02), (torch.float16, .002)])
@torch.no_grad()
def test_constants_in_other_types(dtype, tolerance):
    net, x = dead_bottlenecks().to(dtype), torch.randn(1, 3, 9, 7, dtype=dtype)
    small = slim_model(net)
    assert small[1].conv3.in_channels == 3 and far(small(x).double(), net(x).double()) < tolerance

@torch.no_grad()
def test_constants_on_a_gpu():
    "The zeros that stand for an absent bias are where the weights are."
    want = slim_model(dead_bottlenecks())[1].conv3.bias
    with pretended_cuda() as mode:
        net = dead_bottlenecks()
        for module in net.modules():
            for name, p in module._parameters.items():
                if p is not None: module._parameters[name] = nn.Parameter(mode.pretend(p.data))
            for name, t in module._buffers.items(): module._buffers[name] = mode.pretend(t)
        bias = slim_model(net)[1].conv3.bias
        assert bias.device.type == 'cuda' and far(values_of(bias), want) < 1e-6

@pytest.mark.parametrize('heads', [2, 3])
@pytest.mark.parametrize('first', [True, False])
@torch.no_grad()
def test_a_sequence_alone_and_what_is_refused(first, heads):
    whole = nn.MultiheadAttention(12, heads, batch_first=first).eval()
    size = 12//heads
    whole.out_proj.weight[:, :size] = 0
    few, x = FewerHeads(whole, torch.arange(12) >= size), torch.randn(5, 12)
    mask = torch.randn(5, 5)
    for given in (None, mask):
        want = whole(x, x, x, attn_mask=given, need_weights=False)[0]
        assert few(x, x, x, attn_mask=given)[0].shape == x.shape and far(few(x, x, x, attn_mask=given)[0], want) < 1e-5
    with pytest.raises(OpenTransError, match='heads that are left'):
        few(x, attn_mask=mask.expand(heads, 5, 5))
    with pytest.raises(OpenTransError, match='is_causal'): few(x, is_causal=True)

def test_a_model_of_which_nothing_can_be_cut_says_so():
    "A mask of single weights leaves no unit without all of its weights; LoRA hides the layers that it is added to."
    mlp = nn.Module()
    mlp.fc1, mlp.act, mlp.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
    model = nn.Sequential(mlp).eval()
    with pytest.warns(UserWarning, match='nothing was cut. SparseMask.inner'): slim_model(model)
    mlp.fc1.weight.data[3:] = 0
    mlp.fc1.bias.data[3:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert slim_model(model)[0].fc1.out_features == 3
    net = tiny_vit()
    with add_lora(net, r=2) as added:
        for parts in added.parts.values():
            for parameter in parts.parameters(): parameter.data.normal_()
        with pytest.warns(UserWarning, match='merge_peft'): SparseMask.heads(net, .5).slim(net)

@torch.no_grad()
def test_equal_heads_and_units_stay_as_the_share_says():
    net = timm_vit()
    for block in net.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2): layer.weight.fill_(.1)
    mask = SparseMask.heads(net, .75)
    outputs = [mask[f'blocks.{i}.attn.proj.weight'] for i in (0, 1)]
    assert sum(int(kept[0].sum()) for kept in outputs) == 6*6 # of eight heads of width 6
    mask = SparseMask.inner(net, .25)
    readers = [mask[f'blocks.{i}.mlp.fc2.weight'] for i in (0, 1)]
    assert sum(int(kept[0].sum()) for kept in readers) == 24 + 1 # of 96 units; each block keeps one at least
