/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ICMP "fragmentation needed" (RFC 792; RFC 1191, 4: the next hop's MTU in the last 16 bits). */
#pragma once

#include "ip4.h"

#define ICMP_UNREACHABLE 3
#define ICMP_FRAGMENTATION_NEEDED 4
#define ICMP_QUOTE 68		/* bytes of the datagram: the longest header, and 8 more as RFC 792 wants */
#define ICMP_TOS 0xc0		/* RFC 1812, 4.3.2.5: network control */

struct icmp {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 unused;
	__be16 mtu;
};

_Static_assert(sizeof(struct icmp) == 8, "an ICMP header is 8 bytes");

/* What stands before the quoted datagram in our answer. */
struct too_big {
	struct ip4 ip;
	struct icmp icmp;
} __attribute__((packed));

struct too_big_frame {
	struct eth eth;
	struct too_big head;
	__u8 quote[ICMP_QUOTE];
} __attribute__((packed));

#define ICMP_BYTES (sizeof(struct icmp) + ICMP_QUOTE)

/* mtu: of the datagram that would have fitted. The checksum is the caller's, over ICMP_BYTES. */
static __always_inline void write_icmp(struct icmp *icmp, __u16 mtu)
{
	icmp->type = ICMP_UNREACHABLE;
	icmp->code = ICMP_FRAGMENTATION_NEEDED;
	icmp->checksum = 0;
	icmp->unused = 0;
	icmp->mtu = bpf_htons(mtu);
}
