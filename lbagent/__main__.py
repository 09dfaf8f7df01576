from lbagent.cli import main

main()
