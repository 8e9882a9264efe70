from gradmap_hub.cli.app import main

if __name__ == "__main__":
    main()
