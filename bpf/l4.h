/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What of TCP (RFC 9293, 3.1) and UDP (RFC 768) a balancer needs: ports, and the flags of TCP. */
#pragma once

#include "cursor.h"

struct tcp {
	__u32 ports;		/* little-endian: source port in the low half, both big-endian in themselves */
	__be32 sequence;
	__be32 acknowledged;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};

struct udp {
	__u32 ports;
	__be16 length;
	__be16 checksum;
};

_Static_assert(sizeof(struct tcp) == 20 && sizeof(struct udp) == 8, "L4 headers without options");

static __always_inline __be16 dst_port(__u32 ports)
{
	return ports >> 16;
}

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* The first packet of a connection: nobody has answered yet. */
static __always_inline bool opens(__u8 tcp_flags)
{
	return (tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool ends(__u8 tcp_flags)
{
	return tcp_flags & (TCP_FIN | TCP_RST);
}
