"""Network graphs, their builder, reparameterisation, and checkpoints."""

from yolov9_fast.models.checkpoint import convert, load_checkpoint, save_weights, suggest_architecture
from yolov9_fast.models.graph import Graph, GraphError, list_models, load_graph
from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.pgi import BranchBuilder, attach, backbone_levels, branch_names, register_branch
from yolov9_fast.models.profile import Cost, graph_cost, network_costs
from yolov9_fast.models.reparameterize import calibrate_batch_norm, fuse, to_deploy, unfuse
from yolov9_fast.models.transfer import TransferReport, load_pretrained, transfer_weights
from yolov9_fast.nn.output import DetectionOutput

__all__ = [
    "BranchBuilder",
    "Cost",
    "DetectionModel",
    "DetectionOutput",
    "Graph",
    "GraphError",
    "TransferReport",
    "attach",
    "backbone_levels",
    "branch_names",
    "calibrate_batch_norm",
    "convert",
    "create_model",
    "fuse",
    "graph_cost",
    "list_models",
    "load_checkpoint",
    "load_graph",
    "load_pretrained",
    "network_costs",
    "register_branch",
    "save_weights",
    "suggest_architecture",
    "to_deploy",
    "transfer_weights",
    "unfuse",
]
