"""Kernels of plm: attention on packed sequences, rotary positions, packed linear weights, norms. Imports only torch."""

from plm_kernels.convolution import convolution, filters_available, pack_filters
from plm_kernels.eight_bit import FEW, eight_bits, linear_8bit
from plm_kernels.global_attention import global_attention
from plm_kernels.linear import ACTIVATIONS, Activation, linear, pack_weight, packing_available
from plm_kernels.norms import rms_norm
from plm_kernels.packed_attention import attention, attention_backends, runs
from plm_kernels.parts import attention_part, merge_parts, padded_keys
from plm_kernels.reference import RelativeBias, attention_weights
from plm_kernels.rotary import Turns, rotary_half, rotary_pairs

__all__ = [
    "ACTIVATIONS",
    "FEW",
    "Activation",
    "RelativeBias",
    "Turns",
    "attention",
    "attention_backends",
    "attention_part",
    "attention_weights",
    "convolution",
    "eight_bits",
    "filters_available",
    "global_attention",
    "linear",
    "linear_8bit",
    "merge_parts",
    "pack_filters",
    "pack_weight",
    "packing_available",
    "padded_keys",
    "rms_norm",
    "rotary_half",
    "rotary_pairs",
    "runs",
]
