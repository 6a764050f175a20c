"Files of layer tables: damaged, forged, and of an older opentrans."
import json, math, warnings
import pandas as pd
import torch
from mutations import check_reader
from safetensors.torch import save_file
from torch import nn
from opentrans.heavy_tail import LayerTable, analyze

def small_table():
    "Layers with a spectrum, and without one."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Linear(60, 50), nn.Linear(50, 50))
    net[2].weight.data[0, 0] = math.nan
    return analyze(net)

def test_damaged_and_forged_tables_are_refused(tmp_path):
    "What is read can be shown and chosen from, and what is only damaged is never read as something else."
    path = tmp_path/'table.safetensors'
    small_table().save(path)
    def read(target, file):
        table = LayerTable.load(file)
        table.to_frame().to_html()
        table.select(.5)
        return table
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        check_reader(path, read, same=lambda t: t.frame.to_json() + str((t.xmin, t.few, t.max_aspect, t.options)))

def test_tables_of_opentrans_0_1_still_load(tmp_path):
    "They called themselves by another word, wrote NaN as NaN, and had no checksum."
    table, path = small_table(), tmp_path/'table.safetensors'
    about = [{k: v for k, v in vars(s).items() if k != 'evals'} | dict(has_evals=s.evals is not None)
             for s in table.spectra.values()]
    meta = dict(kind='opentrans.LayerTable', spectra=json.dumps(about), xmin=json.dumps(dict(rule=table.xmin)),
                few=str(table.few), max_aspect=json.dumps(dict(limit=table.max_aspect)),
                options=json.dumps(table.options))
    assert 'NaN' in meta['spectra']
    save_file({f'evals.{n}': torch.from_numpy(s.evals.copy())
               for n, s in table.spectra.items() if s.evals is not None}, path, metadata=meta)
    pd.testing.assert_frame_equal(LayerTable.load(path).frame, table.frame)
