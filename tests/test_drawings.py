"""Every picture that the package draws can be printed: nothing is cut off, nothing meets, and odd data are said."""
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from opentrans.cka.streams import plot_cka
from opentrans.data.samples import show_sample
from opentrans.errors import OpenTransError
from opentrans.escape import for_plot
from opentrans.experiments.figures import plot_courses, plot_density
from opentrans.heavy_tail.table import analyze, plot_choices
from opentrans.pruning.mask import plot_overlap, SparseMask
from opentrans.pruning.rounds import plot_history
from opentrans.runtime import get_axes, log_axis
from opentrans.sparse.speed import plot_speed
from opentrans.training.evaluate import plot_runs
from opentrans.vit.search import plot_locality
from opentrans.vit.spt import plot_profile

@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close('all')

def of(*layers):
    model = nn.Sequential(*(nn.Linear(*weight.shape[::-1]) for weight in layers))
    with torch.no_grad():
        for layer,weight in zip(model, layers): layer.weight.copy_(weight)
    return model

def drawn(ax):
    ax.figure.canvas.draw()
    return ax.figure.bbox

def boxes(ax):
    "Where the names of both axes, the title and all texts of ticks in sight lie."
    whole = drawn(ax)
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label]
    for axis,(low,high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels())
        texts += [label for place,label in ticks if low <= place <= high]
    return whole,[text.get_window_extent() for text in texts if text.get_text().strip() and text.get_visible()]

def check_inside(ax):
    whole,found = boxes(ax)
    assert found
    for box in found:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < whole.x1+1 and box.y1 < whole.y1+1, (box, whole)

def check_apart(axis, low, high):
    "No two names along an axis meet."
    axis.figure.canvas.draw()
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels())
    found = [label.get_window_extent() for place,label in ticks if low <= place <= high and label.get_text()]
    assert len(found) > 1
    assert not any(a.overlaps(b) for a,b in zip(found, found[1:]))

def test_what_stands_at_axes_is_inside_a_saved_figure():
    torch.manual_seed(0)
    model = of(*(torch.randn(64, 64) for _ in range(3)))
    table = analyze(model, skip=())
    name = list(table)[0]
    for ax in (table.plot_alpha(), table.plot_esd(name), table.plot_ks(name), table.plot_hill(name),
               table.plot_change(table), plot_choices({'alpha': table}), plot_choices({'one': table, 'two': table}),
               SparseMask.random(model, .1).plot(), SparseMask.random(model, .1).plot_weights(model),
               plot_cka(pd.DataFrame([[.5]], ['layer1.conv'], ['layer2.conv'])),
               plot_history(pd.DataFrame(dict(round=[0, 1], density=[.5, .1])))):
        check_inside(ax)

def test_a_layout_that_is_asked_for_is_kept():
    assert type(get_axes(layout='tight').figure.get_layout_engine()).__name__ == 'TightLayoutEngine'
    assert type(get_axes().figure.get_layout_engine()).__name__ == 'ConstrainedLayoutEngine'

def test_names_of_many_and_of_long_layers_have_room():
    torch.manual_seed(0)
    ax = SparseMask.random(of(*(torch.randn(4, 4) for _ in range(200))), .5).plot()
    check_apart(ax.xaxis, 0, 198)
    long = nn.Module()
    words = 'sem_seg_head_with_a_very_long_name_of_a_framework_and_more_words'
    for i in range(6): long.add_module(f'{words}_{i}', nn.Linear(8, 8))
    check_inside(SparseMask.random(long, .5).plot())
    assert for_plot('backbone.layer4.weight', 12) == '...r4.weight' and for_plot('short', 12) == 'short'
    frame = pd.DataFrame(np.zeros((30, 79)), range(30), [f'blocks.{i}.mlp' for i in range(79)])
    ax = plot_cka(frame)
    check_apart(ax.xaxis, 0, 78)
    assert {label.get_fontsize() for label in ax.get_xticklabels()} == {9}

def test_numbers_of_many_blocks_do_not_meet():
    index = pd.Index([str(i) for i in range(48)], name='block')
    check_apart(plot_profile(pd.DataFrame(dict(share=np.ones(48)), index)).xaxis, 0, 47)
    table = pd.DataFrame(dict(block=[f'blocks.{i}' for i in range(48)], distance=1., even_distance=2.))
    check_apart(plot_locality(table).xaxis, 1, 48)

def test_a_second_mask_on_the_same_axes_is_not_cut_off():
    model = of(*(torch.randn(16, 16) for _ in range(3)))
    for densities in ((.1, .4), (.4, .1)):
        ax = get_axes()
        for density in densities: SparseMask.random(model, density).plot(ax)
        assert .41 < ax.get_ylim()[1] < .5 and ax.get_ylim()[0] == 0
    assert SparseMask.random(model, .1).plot().get_ylim()[1] > .104

def test_layers_with_equal_eigenvalues_are_drawn_or_said_to_be_so():
    twos = torch.diag(torch.tensor([1.]*32+[2.]*32))
    table = analyze(of(torch.eye(64), twos), skip=())
    same,two = table
    assert 'distinct' in table.plot_ks(same).texts[0].get_text()
    assert 'equal' in table.plot_hill(same).texts[0].get_text()
    ax = table.plot_hill(two)
    assert np.isfinite(ax.get_ylim()).all() and ax.lines
    ax = table.plot_esd(same)
    whole = drawn(ax)
    seen = [bar.get_window_extent().width for bar in ax.patches if bar.get_height() > 0]
    assert len(seen) == 1 and seen[0] > whole.width/100

def test_ticks_of_a_logarithmic_axis_can_be_read():
    for low,high in ((2, 3), (2, 63), (1, 5000), (.02, .9)):
        ax = get_axes(figsize=(5, 3))
        ax.plot([low, high], [1, 2])
        ax.set_xscale('log')
        log_axis(ax.xaxis, low, high)
        check_apart(ax.xaxis, *ax.get_xlim())
    torch.manual_seed(0)
    table = analyze(of(torch.randn(64, 64)), skip=())
    ax = table.plot_hill(list(table)[0])
    check_apart(ax.xaxis, *ax.get_xlim())
    assert not any(label.get_text() for label in ax.get_xticklabels(minor=True))

def test_names_of_runs_do_not_meet():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(miou=rng.random(12), active_macs_M=10**rng.uniform(1, 3, 12),
                              framework=[f'framework {i}' for i in range(12)]), [f'a long name {i}' for i in range(12)])
    frame.iloc[3, 0] = np.nan
    ax = plot_runs(frame)
    drawn(ax)
    check_apart(ax.xaxis, *ax.get_xlim())
    texts = [text.get_window_extent() for text in ax.texts if text.get_visible()]
    assert len(texts) > 5
    assert not any(a.overlaps(b) for i,a in enumerate(texts) for b in texts[:i])
    looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in ax.collections}
    assert len(looks) == 12

def test_rows_of_speed_stand_by_their_bars():
    table = pd.DataFrame(dict(mask=['a', 'a', 'b $x$'], engine='ours', batch=1, height=64, width=64, threads=1,
                              promised=[10., 9, 5], times=[3., 2, 1], low=[2., 1, .5], high=[4., 3, 2]))
    ax = plot_speed(table)
    drawn(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        'a: 1 x 64 x 64, threads: 1', 'a: 1 x 64 x 64, threads: 1', 'b \\$x\\$: 1 x 64 x 64, threads: 1']
    assert [bar.get_y()+bar.get_height()/2 for bar in ax.patches] == pytest.approx([0, 1, 2]*2)

def test_samples_of_one_channel_and_odd_titles():
    regions = np.zeros((1, 8, 8), bool)
    regions[0, :4] = True
    sample = dict(image=np.full((1, 8, 8), .25), labels=np.full((8, 8), 5), regions=regions)
    shown = show_sample(sample, 'regions', title='a_$b$').images[0].get_array()
    assert shown.shape == (8, 8, 3)
    assert (shown[0, 0] == .25).all() and (shown[3, 0] == [1, 0, 1]).all()
    assert show_sample(sample, 'image', title='a_$b$').title.get_text() == 'a_\\$b\\$'
    with pytest.raises(OpenTransError, match='2 names, but the labels go up to 5'):
        show_sample(sample, names=['a', 'b'])

def test_nothing_to_draw_is_one_sentence():
    table = analyze(of(torch.randn(16, 16)), skip=())
    for call in (lambda: table.plot_grid([]), lambda: table.plot_grid(n=0), lambda: plot_choices({}),
                 lambda: plot_overlap({})):
        with pytest.raises(OpenTransError, match='There (are no|is nothing)'): call()

def test_many_masks_fit_on_given_axes():
    model = of(*(torch.randn(8, 8) for _ in range(2)))
    masks = {f'mask {i}': SparseMask.random(model, .5, seed=i) for i in range(25)}
    ax = plot_overlap(masks, get_axes(figsize=(4, 3)))
    assert [label.get_text() for label in ax.get_xticklabels()] == list(masks)

def test_small_and_near_densities_have_true_ticks():
    rows = [dict(mask=kind, density=density, miou_base=50., miou_novel=30.) for kind in ('distilled', 'random')
            for density in (.0004, .001, .0123, .0125, .5)]
    rows.append(dict(mask=None, density=1., miou_base=60., miou_novel=40.))
    ax = plot_density(pd.DataFrame(rows))[0]
    drawn(ax)
    assert ax.get_xticks().tolist() == [.0004, .001, .0123, .5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ['0.0004', '0.001', '0.0123', '0.5']
    check_apart(ax.xaxis, *ax.get_xlim())

def test_numbers_of_many_layers_in_a_course_do_not_meet():
    course = dict(iterations=[0, 1], median=[3., 4.], layers=[f'layer{i}' for i in range(200)], before=[3.]*200,
                  after=[4.]*200)
    axs = plot_courses(dict(dense={'0': course}, sparse={'0': course}))
    check_apart(axs[1].xaxis, 0, 199)

def test_the_random_edge_is_seen_on_a_dark_ground():
    torch.manual_seed(0)
    table = analyze(of(torch.randn(32, 32)), skip=())
    for style,ink in (('default', 'black'), ('dark_background', 'white')):
        with plt.style.context(style):
            ax = table.plot_esd(list(table)[0])
            edge = next(line for line in ax.lines if line.get_label() == 'random edge')
            assert edge.get_color() == ink
