"""The trained SideNet: layers copied from the backbone, and how some of them fuse memory."""
