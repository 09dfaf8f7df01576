/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IPv4 headers (RFC 791, 3.1) and their checksum (RFC 1071). */
#pragma once

#include "cursor.h"

#define IP4_VERSION 4
#define IP4_WORD 4			/* bytes: IHL counts 32-bit words */
#define IP4_DF bpf_htons(0x4000)	/* don't fragment */
#define IP4_FRAGMENT bpf_htons(0x3fff)	/* more fragments, or an offset: part of a datagram */
#define IP4_TTL 64			/* RFC 1700: the recommended default */

enum ip_proto {
	IP_ICMP = 1,
	IP_IPIP = 4,
	IP_TCP = 6,
	IP_UDP = 17,
};

struct ip4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 proto;
	__sum16 checksum;
	__be32 src;
	__be32 dst;
};

_Static_assert(sizeof(struct ip4) == 20, "an IPv4 header without options is 20 bytes");

/* The header's fixed part; NULL if there is none or it is no IPv4 header. Its options come next. */
static __always_inline struct ip4 *take_ip4(struct cursor *cursor)
{
	struct ip4 *ip = take(cursor, sizeof(*ip));

	if (!ip || ip->version_ihl >> 4 != IP4_VERSION || (ip->version_ihl & 0xf) * IP4_WORD < sizeof(*ip))
		return NULL;
	return ip;
}

/* Bytes of header and options, 20 to 60. */
static __always_inline __u32 ip4_header_bytes(const struct ip4 *ip)
{
	return (ip->version_ihl & 0xf) * IP4_WORD;
}

/* 16-bit one's complement of a sum of up to 16 words of 32 bits, which as well is one of 16-bit halves. */
static __always_inline __sum16 fold(__u64 sum)
{
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return ~sum;
}

/* Write a header without options, as an end of a tunnel or the sender of an error does. */
static __always_inline void write_ip4(struct ip4 *ip, __u8 tos, __u16 length, __be16 flags, __u8 proto,
				      __be32 src, __be32 dst)
{
	__u32 *words = (void *)ip;
	__u32 first = bpf_htonl((IP4_VERSION << 4 | 5) << 24 | tos << 16 | length);
	__u32 second = (__u32)flags << 16;	/* as it lies in memory, little-endian: id 0, then flags */
	__u32 third = IP4_TTL | proto << 8;

	words[0] = first;
	words[1] = second;
	words[2] = third | (__u32)fold((__u64)first + second + third + src + dst) << 16;
	words[3] = src;
	words[4] = dst;
}
