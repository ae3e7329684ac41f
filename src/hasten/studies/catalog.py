"""The published systems of the house: where each lives, and whether its study runs yet.

``python -m hasten.studies.catalog`` prints the table of the README. A state is read from the studies that exist, so
that the table cannot claim more than the code.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import ConfigurationError
from hasten.studies.registry import names

__all__ = ["ROOMS", "System", "state", "systems", "table"]

ROOMS: dict[str, dict[str, str]] = {
    "measure": {
        "pulp-nonneural": (
            "DNN is not all you need: Parallelizing Non-Neural ML Algorithms on Ultra-Low-Power IoT Processors"
        ),
    },
    "network": {
        "cross-layer-multimedia": "Cross-Layer Protocols for Multimedia Communications over Wireless Networks",
    },
    "train": {
        "hydra": "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
        "pso": "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        "streaming-diloco": "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
        "frontier-partitioning": "Scaling Large Language Model Training on Frontier with Low-Bandwidth Partitioning",
    },
    "compress": {
        "quantization-survey": "A Survey of Quantization Methods for Efficient Neural Network Inference",
        "q-bert": "Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT",
        "augmented-hessians": (
            "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization"
        ),
        "minifloats": "Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs",
        "svdquant": "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models",
        "efficientdm": "EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models",
        "eda-dm": "Enhanced Distribution Alignment for Post-Training Quantization of Diffusion Models",
        "maestro": "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
        "modegpt": "MoDeGPT: Modular Decomposition for Large Language Model Compression",
        "transmla": "TransMLA: Multi-head Latent Attention Is All You Need",
        "acm": "Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference",
        "tiny-transient-transformer": (
            "The Tiny Time-series Transformer: Low-latency High-throughput Classification of "
            "Astronomical Transients using Deep Model Compression"
        ),
    },
    "adapt": {
        "cbnet": "A Converting Autoencoder Toward Low-latency and Energy-efficient DNN Inference at the Edge",
        "approxdet": "ApproxDet: Content and Contention-Aware Approximate Object Detection for Mobiles",
        "nano-drone-pose": (
            "Adaptive Deep Learning for Efficient Visual Pose Estimation aboard Ultra-low-power Nano-drones"
        ),
        "verbosity-cascade": (
            "Verbosity != Veracity: Demystify Verbosity Compensation Behavior of Large Language Models"
        ),
    },
    "spiking": {
        "iir-snn": "One Timestep is All You Need: Training Spiking Neural Networks with Ultra Low Latency",
        "astrosnn": "Astrocyte-Enabled Advancements in Spiking Neural Networks for Large Language Modeling",
        "dynamic-confidence": "Unleashing the Potential of Spiking Neural Networks by Dynamic Confidence",
        "dcls-delays": "Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings",
    },
    "search": {
        "mnasnet": "MnasNet: Platform-Aware Neural Architecture Search for Mobile",
        "proxylessnas": "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware",
        "elasticvit": (
            "ElasticViT: Conflict-aware Supernet Training for Deploying Fast Vision Transformer on "
            "Diverse Mobile Devices"
        ),
        "turbovit": "TurboViT: Generating Fast Vision Transformers via Generative Architecture Search",
        "spaceevo": "SpaceEvo: Hardware-Friendly Search Space Design for Efficient INT8 Inference",
        "marl-dse": "Multi-Agent Reinforcement Learning for Microprocessor Design Space Exploration",
        "deeppeep": "DeepPeep: Exploiting Design Ramifications to Decipher the Architecture of Compact DNNs",
    },
    "language": {
        "lean-attention": (
            "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers"
        ),
        "dyspec": "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure",
        "triforce": (
            "TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding"
        ),
        "cachegen": "CacheGen: Fast Context Loading for Language Model Applications",
        "fim-curriculum": "Improving FIM Code Completions via Context & Curriculum Based Learning",
        "llava-mini": "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token",
    },
    "vision": {
        "efficientformer": "EfficientFormer: Vision Transformers at MobileNet Speed",
        "shvit": "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        "yolov10": "YOLOv10: Real-Time End-to-End Object Detection",
        "damo-yolo": "DAMO-YOLO: A Report on Real-Time Object Detection Design",
        "fastdepth": "FastDepth: Fast Monocular Depth Estimation on Embedded Systems",
        "mobile-r2l": "Real-Time Neural Light Field on Mobile Devices",
        "efficient-tam": "Efficient Track Anything",
        "hasper": "HaSPeR: An Image Repository for Hand Shadow Puppet Recognition",
        "gazegen": "GazeGen: Gaze-Driven User Interaction for Visual Content Generation",
        "ui-jepa": "UI-JEPA: Towards Active Perception of User Intent through Onscreen User Activity",
    },
    "events": {
        "vpr-biasing": "Enhancing Visual Place Recognition via Fast and Slow Adaptive Biasing in Event Cameras",
        "evpropnet": "EVPropNet: Detecting Drones By Finding Propellers For Mid-Air Landing And Following",
        "hardvs-estf": "HARDVS: Revisiting Human Activity Recognition with Dynamic Vision Sensors",
        "hr-inr": "HR-INR: Continuous Space-Time Video Super-Resolution via Event Camera",
        "robust-e-nerf": "Robust e-NeRF: NeRF from Sparse & Noisy Events under Non-Uniform Motion",
        "spikepoint": (
            "SpikePoint: An Efficient Point-based Spiking Neural Network for Event Cameras Action Recognition"
        ),
    },
    "retrieve": {
        "spann": "SPANN: Highly-efficient Billion-scale Approximate Nearest Neighbor Search",
        "tas-balanced": "Efficiently Teaching an Effective Dense Retriever with Balanced Topic Aware Sampling",
        "margin-mse": "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        "baidu-ranking": "Pre-trained Language Model based Ranking in Baidu Search",
        "two-tower-hgnn": "Personalized Audiobook Recommendations at Spotify Through Graph Neural Networks",
    },
    "speech": {
        "tiger": "TIGER: Time-frequency Interleaved Gain Extraction and Reconstruction for Efficient Speech Separation",
        "ancat": "Lookahead When It Matters: Adaptive Non-causal Transformers for Streaming Neural Transducers",
        "seamless": "Seamless: Multilingual Expressive and Streaming Speech Translation",
        "freeze-omni": "Freeze-Omni: A Smart and Low Latency Speech-to-speech Dialogue Model with Frozen LLM",
        "omniflatten": "OmniFlatten: An End-to-end GPT Model for Seamless Voice Conversation",
        "minmo": "MinMo: A Multimodal Large Language Model for Seamless Voice Interaction",
        "flow-omni": "Continuous Speech Tokens Makes LLMs Robust Multi-Modality Learners",
        "wavchat": "WavChat: A Survey of Spoken Dialogue Models",
    },
    "serve": {
        "sarathi-serve": "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
        "deepspeed-fastgen": (
            "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference"
        ),
        "smartspec": "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput",
        "distserve": (
            "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving"
        ),
        "llumnix": "Llumnix: Dynamic Scheduling for Large Language Model Serving",
        "flexllm": "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning",
        "tpi-llm": "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices",
        "ce-collm": "CE-CoLLM: Efficient and Adaptive Large Language Models Through Cloud-Edge Collaboration",
    },
    "apps": {
        "traffic-signalling": (
            "An Edge Assisted Robust Smart Traffic Management and Signalling System for Guiding "
            "Emergency Vehicles During Peak Hours"
        ),
    },
    "studies": {
        "slm-survey": (
            "A Comprehensive Survey of Small Language Models in the Era of Large Language Models: "
            "Techniques, Enhancements, Applications, Collaboration with LLMs, and Trustworthiness"
        ),
    },
}
"""Room, then system, then the title of its publication; rooms in the order of the floors."""

_BASE_ONLY = frozenset({"fim-curriculum"})
"""Systems whose study reruns the base that the publication builds on, and not yet its own claim."""


@dataclass(frozen=True)
class System:
    """One published system.

    >>> systems()[0]
    System(slug='pulp-nonneural', title='DNN is not all you need: Parallelizing Non-Neural ML Algorithms on \
Ultra-Low-Power IoT Processors', room='measure')
    """

    slug: str
    """short name, that of its study"""
    title: str
    """title of the publication"""
    room: str
    """room of the house that holds it"""


def systems() -> list[System]:
    """All systems, by room."""
    return [System(slug, title, room) for room, held in ROOMS.items() for slug, title in held.items()]


def state(slug: str) -> str:
    """``study runs``, ``base part`` or ``planned``.

    >>> state("sarathi-serve")
    'study runs'

    Raises :class:`~hasten.errors.ConfigurationError` for a system that is not in the catalog.
    """
    if not any(slug in held for held in ROOMS.values()):
        raise ConfigurationError(f"there is no system {slug!r} in the catalog; see hasten.studies.catalog.ROOMS")
    if slug not in names():
        return "planned"
    return "base part" if slug in _BASE_ONLY else "study runs"


def table() -> str:
    """The systems as a Markdown table, by room."""
    rows = ["| system | publication | room | state |", "| --- | --- | --- | --- |"]
    rows += [f"| `{s.slug}` | {s.title} | `{s.room}` | {state(s.slug)} |" for s in systems()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
