/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IP in IP (RFC 2003): what stands before the packet on its way to a real. */
#pragma once

#include "abi.h"
#include "eth.h"
#include "ip4.h"

struct encap {
	struct eth eth;
	struct ip4 ip;
} __attribute__((packed));

/* hop->dmac and smac lie as in the header; word by word, as the compiler would go by halves. */
static __always_inline void write_eth(struct eth *eth, const struct hop *hop)
{
	const __u32 *from = (const void *)hop;
	__u32 *to = (void *)eth;

	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	eth->type = ETH_IP4;
}

/* The outer source: flows differ in its host bits, so that a receiver spreads them over its queues. */
static __always_inline __be32 encap_source(__u32 prefix, __u32 prefix_bits, __u64 hash)
{
	return bpf_htonl(prefix | (hash & (0xffffffffULL >> prefix_bits)));
}
