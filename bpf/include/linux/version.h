/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc asks whether the kernel is new enough for what it generates; what it asks about came before 6.0. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 0, 0)
