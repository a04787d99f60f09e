"""Makes goldens/resampled.json: position embeddings as OpenCLIP's resize_pos_embed resamples them."""

import json
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights
import open_clip

goldens = []
for old, new in ((3, 5), (5, 3), (4, 4), (7, 2), (2, 7)):
    table = torch.from_numpy(weights.tensor("table.positions", (old * old + 1, 3)))
    model = types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=(new, new)))
    state = {"visual.positional_embedding": table}
    open_clip.model.resize_pos_embed(state, model)
    result = state["visual.positional_embedding"].tolist()
    goldens.append(
        {"old": old, "new": new, "table": [[float(f"{x:.8g}") for x in row] for row in result]}
    )
(Path(__file__).parent.parent / "goldens" / "resampled.json").write_text(json.dumps(goldens) + "\n")
