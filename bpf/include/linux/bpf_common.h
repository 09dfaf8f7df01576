/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Included by bcc's copy of linux/bpf.h for classic BPF, which nobody uses here. */
