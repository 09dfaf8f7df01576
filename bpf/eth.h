/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Ethernet II (IEEE 802.3, 3.2.6: a type, not a length). */
#pragma once

#include "cursor.h"

#define ETH_MAC_BYTES 6
#define ETH_IP4 bpf_htons(0x0800)

struct eth {
	__u8 dmac[ETH_MAC_BYTES];
	__u8 smac[ETH_MAC_BYTES];
	__be16 type;
};

_Static_assert(sizeof(struct eth) == 14, "an Ethernet header is 14 bytes");

static __always_inline struct eth *take_eth(struct cursor *cursor)
{
	return take(cursor, sizeof(struct eth));
}

/* Make of a header that came, which is at `from`, the one that goes back. */
static __always_inline void turn_back(struct eth *eth, const struct eth *from)
{
	struct eth came = *from;

	__builtin_memcpy(eth->dmac, came.smac, ETH_MAC_BYTES);
	__builtin_memcpy(eth->smac, came.dmac, ETH_MAC_BYTES);
	eth->type = came.type;
}
