"""The paper (arXiv 2402.13616), reproduced by command: its tables, figures and appendix, one module each.

`TARGETS` names what `yolov9-fast paper` can rebuild; each module has `configure(parser, target)` and `run(arguments)`,
where `arguments.target` is the name it was called by.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A table or figure: the module that rebuilds it, and one line on what it shows."""

    module: str
    text: str


TARGETS: dict[str, Target] = {
    "tables": Target("ablation", "tables 1 to 6: parameters and GFLOPs next to the published ones (--dry)"),
    "table1": Target("ablation", "GELAN and YOLOv9 of every size"),
    "table2": Target("ablation", "computational blocks in GELAN: Conv, Res, Dark, CSP, and your own"),
    "table3": Target("ablation", "ELAN depth and CSP depth"),
    "table4": Target("ablation", "auxiliary branches on backbone and neck: PFH, FPN, PAN, ICN, lead-head guided"),
    "table5": Target("ablation", "GELAN, deep supervision, PGI"),
    "table6": Target("ablation", "the chain from YOLOv7: anchor-free, GELAN, DHLC, PGI"),
    "graph": Target("network", "a network with other blocks, depths or auxiliary branch, as a graph file to train"),
    "fig1": Target("scatter", "AP against parameters, of detectors trained from scratch (Figure 1)"),
    "fig2": Target("maps", "feature maps of a picture in four random networks of 50 layers (Figure 2)"),
    "fig5": Target("scatter", "AP against parameters and GFLOPs, of all detectors compared (Figure 5)"),
    "fig6": Target("maps", "feature maps of a picture in random networks by depth, 50 to 200 layers (Figure 6)"),
    "fig7": Target("fig7", "neck maps of GELAN and YOLOv9 after an epoch of warm-up (Figure 7)"),
    "comparison": Target("tables", "published detectors in one table (Table 1, appendix Tables 3 to 5)"),
    "recipe": Target("tables", "the hyper-parameters as a recipe file for `train --config` (appendix Table 1)"),
    "network": Target("tables", "the configuration of YOLOv9-C (appendix Table 2)"),
    "recovery": Target("recovery", "how much of a picture the features of random networks keep, by depth (section 3)"),
}
