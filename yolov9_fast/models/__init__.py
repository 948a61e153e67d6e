"""Network graphs, their builder, reparameterisation, and checkpoints."""

from yolov9_fast.models.graph import Graph, GraphError, graph_names, load_graph
from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.profile import Cost, network_costs
from yolov9_fast.models.reparameterize import calibrate_batch_norm, fuse, to_deploy, unfuse
from yolov9_fast.nn.output import DetectionOutput

__all__ = [
    "Cost", "DetectionModel", "DetectionOutput", "Graph", "GraphError", "calibrate_batch_norm", "create_model", "fuse",
    "graph_names", "load_graph", "network_costs", "to_deploy", "unfuse",
]
