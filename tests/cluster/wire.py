"""A bad wire between two network interfaces of this network namespace: frames that come in at one go out at the other, later, and
some of them never. wire.py ONE OTHER SECONDS SHARE

wire.py --plain INTERFACE: what an interface sends has its checksums from now on, which the kernel otherwise leaves to hardware."""

import array
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

if sys.argv[1] == "--plain":
    SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
    off = array.array("B", struct.pack("II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP", sys.argv[2].encode(), off.buffer_info()[0])
    fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), SIOCETHTOOL, request)
    sys.exit()

names, (delay, lost) = sys.argv[1:3], map(float, sys.argv[3:5])
ends = []
for name in names:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    end.bind((name, 0))
    end.setblocking(False)
    ends.append(end)
luck = random.Random(7)
waiting, number, dropped = [], 0, 0
print("ready", flush=True)
while True:
    pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
    for end in select.select(ends, [], [], pause)[0]:
        try:
            frame, (_, _, kind, *_) = end.recvfrom(1 << 17)
        except OSError:
            continue
        # What this process sent itself is seen here as well.
        if kind == socket.PACKET_OUTGOING:
            continue
        number += 1
        if luck.random() < lost:
            dropped += 1
            if dropped % 100 == 0:
                print(f"{dropped} of {number} frames lost", flush=True)
            continue
        heapq.heappush(waiting, (time.monotonic() + delay, number, ends[1 - ends.index(end)], frame))
    while waiting and waiting[0][0] <= time.monotonic():
        _, _, end, frame = heapq.heappop(waiting)
        try:
            end.send(frame)
        except OSError:
            # No room: lost as well.
            dropped += 1
