"""Spiking networks: neurons, encodings, fewer timesteps, learned delays, exits on confidence, glia.

>>> import torch
>>> from hasten.spiking import LIF
>>> LIF(decay=0.9)(torch.full((4, 1), 0.6)).flatten().tolist()
[0.0, 1.0, 0.0, 1.0]
"""

from hasten.spiking.astrocyte import AstroConfig, AstroLM, AstroStream
from hasten.spiking.cochlea import Cochlea, CochleaStream, cochleagram
from hasten.spiking.confidence import ConfidenceExit, Decision, Exit, Observation, Run, run_until
from hasten.spiking.convert import QuantisedClip, quantised, to_spiking
from hasten.spiking.cost import spiking_cost
from hasten.spiking.delay import DelayLinear, DiscreteDelayLinear
from hasten.spiking.delay_line import DelayLine
from hasten.spiking.delay_net import DelayConfig, DelayNet, DelayStream
from hasten.spiking.events import SpikeLinear
from hasten.spiking.exchange import from_nir, to_nir
from hasten.spiking.exits import Confident, DynamicConfidence, synaptic_energy
from hasten.spiking.fit import Fitting, accuracy, fit
from hasten.spiking.layers import IF, LIF, PLIF, Adaptive, Alpha, Leak, Neuron, Synaptic, constrain
from hasten.spiking.network import OneStep, SpikingNetwork
from hasten.spiking.neuron import (
    AdaptiveParameters,
    AlphaParameters,
    LIFParameters,
    SynapticParameters,
    adaptive_step,
    alpha_step,
    decay_of,
    if_step,
    leak_step,
    lif_step,
    plif_step,
    synaptic_step,
)
from hasten.spiking.recogniser import Heard, Recogniser, load_recogniser
from hasten.spiking.scan import adaptive_scan, alpha_scan, leak_scan, lif_scan, synaptic_scan
from hasten.spiking.surrogate import SURROGATES, Surrogate, spike
from hasten.spiking.timesteps import SpikeVanishing, Stage, TimestepReduction, Timesteps

__all__ = [
    "IF", "LIF", "PLIF", "SURROGATES", "Adaptive", "AdaptiveParameters", "Alpha", "AlphaParameters", "AstroConfig",
    "AstroLM", "AstroStream", "Cochlea", "CochleaStream", "ConfidenceExit", "Confident", "Decision", "DelayConfig",
    "DelayLine", "DelayLinear", "DelayNet", "DelayStream", "DiscreteDelayLinear", "DynamicConfidence", "Exit",
    "Fitting", "Heard", "LIFParameters", "Leak", "Neuron", "Observation", "OneStep", "QuantisedClip", "Recogniser",
    "Run", "SpikeLinear", "SpikeVanishing", "SpikingNetwork", "Stage", "Surrogate", "Synaptic", "SynapticParameters",
    "TimestepReduction", "Timesteps", "accuracy", "adaptive_scan", "adaptive_step", "alpha_scan", "alpha_step",
    "cochleagram", "constrain", "decay_of", "fit", "from_nir", "if_step", "leak_scan", "leak_step", "lif_scan",
    "lif_step", "load_recogniser", "plif_step", "quantised", "run_until", "spike", "spiking_cost", "synaptic_energy",
    "synaptic_scan", "synaptic_step", "to_nir", "to_spiking",
]  # fmt: skip
